"""Llama, and the families whose blocks are Llama's but for a bias, a norm or a window. No torch here."""

from dataclasses import replace

from lowmem_rlhf.architecture.families.block import Block
from lowmem_rlhf.architecture.families.layers import experts
from lowmem_rlhf.architecture.families.row import Family, GGUFArchitecture

ATTENTION_BIASED = Block(qkv_bias=("attention_bias", False), out_bias=("attention_bias", False))
LLAMA = replace(ATTENTION_BIASED, mlp_bias=("mlp_bias", False))
_GGUF = GGUFArchitecture("llama", metadata="rotary", output_bias=True, rope_types=("llama3",), pairs_rows=True)
_QWEN3 = replace(ATTENTION_BIASED, qk_norm="head", head_dim=128, window=4096, window_opt_in=True)
GRANITE_SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}

ROWS = {
    "llama": Family(LLAMA, tested=True, gguf=_GGUF),
    "mistral": Family(Block(window=4096), tested=True, gguf=_GGUF),
    "qwen2": Family(
        Block(qkv_bias=True, window=4096, window_opt_in=True),
        tested=True,
        gguf=GGUFArchitecture("qwen2", metadata="rotary"),
    ),
    "qwen3": Family(
        _QWEN3,
        tested=True,
        gguf=GGUFArchitecture("qwen3", metadata="rotary"),
    ),
    "phi3": Family(
        Block(fused=True, names=("o_proj", "gate_up_proj", "down_proj")),
        tested=True,
        gguf=GGUFArchitecture(
            "phi3",
            layer_names={"ffn_up": "gate_up_proj"},
            metadata="rotary",
            rope_types=("longrope",),
            states_no_window=True,
        ),
    ),
    "granite": Family(
        replace(LLAMA, embedding_scale=True),
        tested=True,
        gguf=replace(
            _GGUF,
            name="granite",
            scales=GRANITE_SCALES,
        ),
    ),
    "qwen3_moe": Family(_QWEN3, counted=True, experts=experts()),
    "ministral3": Family(
        Block(), gguf=GGUFArchitecture("mistral3", metadata="rotary", pairs_rows=True, attention_factors=True)
    ),
    "smollm3": Family(
        replace(LLAMA, tied=True, window_opt_in=True), gguf=replace(_GGUF, name="smollm3", position_free=4)
    ),
}
