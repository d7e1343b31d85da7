"""What a configuration's fields become in a tiny model: rules by name, and what single model types need beyond them."""

from typing import Any

VOCABULARY = 320  # 260 ids of a tokenizer of bytes, and some that stand for pictures and sounds
HIDDEN, INNER, EXPERT, HEADS, GROUPS, HEAD_DIM, LENGTH, WINDOW = 64, 128, 64, 4, 2, 16, 256, 8

# A rule holds for fields whose default is a number (or, with `None` in `OPTIONAL`, is left out).
NUMBERS: dict[str, int] = {
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "embedding_size", "embedding_dim"),
            *(
                "input_embedding_size",
                "output_embedding_size",
                "attention_hidden_size",
                "lru_width",
                "hidden_size_global",
            ),
            *("backbone_hidden_size", "out_hidden_size", "mamba_d_ssm", "adapter_out_dim", "adapter_in_dim"),
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff", "ffn_hidden_size"),
            *(
                "d_inner",
                "feed_forward_size",
                "intermediate_size_mlp",
                "dense_intermediate_size",
                "prefix_dense_intermediate_size",
            ),
            "mlp_dim",
        ),
        INNER,
    ),
    **dict.fromkeys(
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
            *("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
        ),
        EXPERT,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "mamba_n_heads"),
            *("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
            *("swa_num_attention_heads", "linear_num_heads", "attention_heads", "mamba_num_heads"),
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "num_query_groups"),
            *("linear_num_key_heads", "linear_num_value_heads"),
        ),
        GROUPS,
    ),
    **dict.fromkeys(
        (
            *(
                "head_dim",
                "dim_head",
                "swa_head_dim",
                "kv_channels",
                "d_head",
                "attention_head_size",
                "attention_head_dim",
            ),
            *("mamba_d_head", "mamba_head_dim", "mamba_headdim", "linear_head_dim", "linear_key_head_dim"),
            *("linear_value_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"),
        ),
        HEAD_DIM,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_experts_per_token"), 2
    ),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(
        ("sliding_window", "attention_window_size", "window_size", "sliding_window_size", "local_attention"), WINDOW
    ),
    **dict.fromkeys(("attention_chunk_size", "local_attention_window_len", "rel_extent", "keep_window_size"), WINDOW),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size", "index_topk"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    "index_n_heads": 16,  # with few, sums of ReLUs are often exactly zero, and what is kept of equals is chance
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers"), 1),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers"), 2),
    **dict.fromkeys(("no_rope_layer_interval", "layer_group_size", "interleave_moe_layer_step"), 2),
    **dict.fromkeys(
        (
            *(
                "num_hidden_layers",
                "n_layer",
                "n_layers",
                "num_layers",
                "decoder_layers",
                "encoder_layers",
                "num_blocks",
            ),
            *("num_encoder_layers", "num_decoder_layers", "depth", "num_layers_per_stack", "num_global_layers"),
        ),
        2,
    ),
    **dict.fromkeys(
        (
            *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "context_length"),
            *("max_target_positions", "max_source_positions", "original_max_position_embeddings"),
        ),
        LENGTH,
    ),
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "gated_norm_rank": 4,
    "router_hidden_size": 32,
    "d_rel": 4,
    "log_scaling_n_floor": 4,
    "floor_scale": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "pronunciation_embed_dim": 32,
    "shape_embed_dim": 32,
    "pronunciation_vocab_size": VOCABULARY,
    "shape_vocab_size": VOCABULARY,
    "adapter_rank": 8,
    "num_position_embeddings": 16,
    "position_bias_num_buckets": 16,
    "position_bias_max_distance": 32,
    "hc_lowrank": 16,
    "ple_embed_dim": 16,
    "ngram_vocab_size_base": 64,
    "zero_expert_num": 2,
    "relative_max_distance": 32,
    "num_buckets": 8,
    "moe_layer_interval": 1,
    "query_pre_attn_scalar": HEAD_DIM,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "base_channels": 32,
    "dim_model_base": 32,
    "block_multiple_of": 32,
    "num_centroids": 16,
    "centroid_intermediate_top_k": 4,
    "max_num_tiles": 1,
}
# factors that stand at 1 by default, where one forgotten would not show
FACTORS: dict[str, float] = {
    "logits_scaling": 4.0,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "lm_head_multiplier": 0.7,
    "key_multiplier": 0.8,
    "attention_out_multiplier": 0.9,
    "attention_in_multiplier": 1.2,
    "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.8,
    "routed_scaling_factor": 1.5,
    "route_scale": 1.5,
    "router_scaling_factor": 1.5,
    "moe_routed_scaling_factor": 1.5,
    "full_attn_alpha_factor": 1.2,
    "full_attn_beta_factor": 0.8,
    "linear_attn_alpha_factor": 1.1,
    "linear_attn_beta_factor": 0.7,
    "mlp_alpha_factor": 1.3,
    "mlp_beta_factor": 0.9,
}
SWITCHES: dict[str, bool] = {"use_sliding_window": True}  # on, so that they matter

# set although the default is None, where a class that counts on it fails without
OPTIONAL: dict[str, int] = {
    "num_key_value_heads": GROUPS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}
LATENT: dict[str, int] = {"head_dim": 8, "num_key_value_heads": HEADS}  # latent attention: head_dim is what is rotated

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
_SHARING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_ZAMBA = {
    "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_hidden_layers": 5,
    "attention_hidden_size": 2 * HIDDEN,
    "attention_head_dim": 2 * HIDDEN // HEADS,
    "num_key_value_heads": HEADS,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    **dict.fromkeys(("linear_num_key_heads",), 2),
    "linear_num_value_heads": 4,
}
_ASSISTANT = {
    "text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 2,
        **_SLIDING_FULL,
    }
}
_GEMMA3N = {
    **_SHARING,
    "intermediate_size": [INNER] * 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "num_kv_shared_layers": 2,
}
_DOTS3 = {
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), HEADS),
    **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 32),
    **{"head_dim": 24, "swa_head_dim": 24, "swa_qk_nope_head_dim": HEAD_DIM, "swa_v_head_dim": HEAD_DIM},
}
_MROPE = {**_ROTARY, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        **_SLIDING_FULL,
        "rope_parameters": {
            "full_attention": {**_ROTARY, "mrope_section": [2, 3, 3]},
            "sliding_attention": {**_ROTARY, "mrope_section": [2, 3, 3]},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": _DOTS3, "audio_config": {"adapter_input_size": HIDDEN}},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mlp_multipliers": [0.8, 1.2], "ssm_multipliers": [1.1, 0.9, 0.8, 1.2, 0.7]},
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma4_text": {**_SHARING, "global_head_dim": 32},
    "gemma4": {"text_config": {**_SHARING, "global_head_dim": 32}},
    "gemma4_unified_text": {**_SHARING, "global_head_dim": 32},
    "gemma4_unified": {"text_config": {**_SHARING, "global_head_dim": 32}},
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "num_local_experts": 0,
    },
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "mllama": {
        "vision_config": {"max_num_tiles": 4},
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    },
    "ministral": {"head_dim": HEAD_DIM, **_SLIDING_FULL},
    "qwen3_5": {"text_config": {"rope_parameters": _MROPE}},
    "qwen3_5_text": {"rope_parameters": _MROPE},
    "qwen3_5_moe": {"text_config": {"rope_parameters": _MROPE}},
    "qwen3_5_moe_text": {"rope_parameters": _MROPE},
    "qwen4_exp": {"text_config": {"rope_parameters": _MROPE, **_INDEXER}},
    "qwen4_exp_text": {"rope_parameters": _MROPE, **_INDEXER},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "n_mamba_heads": 8, "mamba_headdim": 16},
}
# further forms of a type that its default does not show: name -> (type, fields)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert+decoder": ("bert", {"is_decoder": True}),
    "roberta+decoder": ("roberta", {"is_decoder": True}),
    "xlm+causal": ("xlm", {"causal": True}),
    "cohere+qk_norm": ("cohere", {"use_qk_norm": True}),
    "falcon+new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon+alibi": ("falcon", {"alibi": True}),
    "gemma2+scaled": ("gemma2", {"query_pre_attn_scalar": 20}),
    "gemma4_text+shared": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "granitemoehybrid+experts": ("granitemoehybrid", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma4_text+experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": EXPERT},
    ),
    "gpt2+scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox+sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama+biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama+llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "nemotron_h+dense": ("nemotron_h", {"layers_block_type": ["linear_attention", "full_attention", "mlp"]}),
    "opt+projected": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "phi3+longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.3 * i for i in range(8)],
                "original_max_position_embeddings": LENGTH,
            }
        },
    ),
    "qwen2+full": ("qwen2", {"use_sliding_window": False}),
    "qwen4_exp_text+ngrams": ("qwen4_exp_text", {"ple_layer_ids": [1]}),
    "stablelm+parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
}
