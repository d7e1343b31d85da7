"""Tiny random models of every architecture family, and bases made of them. Not a test module."""

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.rollout.sampling import Sampling

VOCAB = 97
EOS = 3
CPU = torch.device("cpu")

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}

# name -> (model type, what differs); sliding windows are smaller than the sequences of the tests
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            **_LAYER_TYPES,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, **_LAYER_TYPES, "query_pre_attn_scalar": 20}),
    "phi": ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "phi3": ("phi3", {"sliding_window": 5}),
    "gpt2": (
        "gpt2",
        {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "scale_attn_by_inverse_layer_idx": True},
    ),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "starcoder2": ("starcoder2", {"sliding_window": 5, "use_bias": True}),
}
_MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# models with layers that pass a state on: short convolutions, Mamba 2 beside attention or in its place, delta rules
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("falcon_h1", {**_MAMBA, "mamba_d_ssm": 96, "lm_head_multiplier": 0.7}),
    "bamba": ("bamba", {**_MAMBA, "attn_layer_indices": [1]}),
    "granite_hybrid": (
        "granitemoehybrid",
        {**_MAMBA, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 0, "mamba_n_groups": 2}
        | {"shared_intermediate_size": 64, "logits_scaling": 4.0, "residual_multiplier": 0.7},
    ),
    "qwen3_next": ("qwen3_next", {**_DELTA, "head_dim": 16, "mlp_only_layers": [0, 1]}),
    "qwen3_5": ("qwen3_5_text", {**_DELTA, "head_dim": 16, "linear_num_value_heads": 4}),
    "olmo_hybrid": ("olmo_hybrid", _DELTA),
}
# whose GGUF is written
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "ministral3": ("ministral3", {"head_dim": 16}),
}
# beside Gemma 3 those whose residual stream exceeds float16: embeddings of each layer, keys shared between layers
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": (
        "gemma4_text",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 5,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 1,
        },
    ),
}
# models that cannot be packed: attention sinks, biases on the scores, recurrent layers of other kinds
UNPACKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("gpt_oss", {"head_dim": 16, **_LAYER_TYPES, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "gptj": ("gptj", {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128}),
    "mamba": ("mamba", {"state_size": 4}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "attention_window_size": 5,
            "block_types": ["recurrent", "attention"],
            "lru_width": 48,
            "logits_soft_cap": 3.0,
        },
    ),
}
_GPT2_NAMES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a family's tiny model."""
    model_type, own = {**FAMILIES, **RECURRENT, **WIDE, **OTHERS, **UNPACKABLE}[family]
    common = {k: v for k, v in COMMON.items() if model_type not in ("gpt2", "gptj") or k not in _GPT2_NAMES}
    return AutoConfig.for_model(model_type, **{**common, **own, **changes})


def tiny_model(family: str, seed: int = 0, attn: str = "eager", **changes: Any) -> PreTrainedModel:
    """Return a tiny fp32 model all of whose weights, biases and norms are random and large enough to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # delta rules draw how fast they forget
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, **changes), attn_implementation=attn, dtype=torch.float32
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2:
                p.add_(noise, alpha=0.2)
            else:
                p.copy_(noise * (0.5 if "embed" in name or "wte" in name else 1.2 * p.shape[-1] ** -0.5))
    model.requires_grad_(False)
    return model.eval()


def tiny_tokenizer(eos: int | list[int] | None = EOS) -> Any:
    """Return all that a SharedBase reads of a tokenizer."""
    return SimpleNamespace(eos_token_id=eos)


def fill_adapter(base: SharedBase, seed: int = 1, size: float = 0.1) -> None:
    """Make the policy's adapter differ from zero, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in base.trainable().values():
            p.copy_(torch.randn(p.shape, generator=generator) * size)
    base.adapters_changed()


def tiny_base(
    family: str, seed: int = 0, adapter: float = 0.1, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[SharedBase, PreTrainedModel]:
    """Return a base with a non-zero adapter, and a stock model with the same weights and none."""
    stock = tiny_model(family, seed, **changes).to(dtype)
    base = SharedBase(copy.deepcopy(stock), tiny_tokenizer(), f"tiny/{family}", r=4, lora_alpha=8)
    if adapter:
        fill_adapter(base, size=adapter)
    return base, stock


def ragged_groups(seed: int = 0, shapes: Sequence[tuple[int, Sequence[int]]] = ()) -> list[Group]:
    """Return groups of random tokens for (prompt length, completion lengths); rows count up."""
    shapes = shapes or [(7, [6, 1, 9]), (3, [4, 4, 2]), (7, [1, 1, 1]), (1, [5, 8, 3]), (11, [10])]
    generator = torch.Generator().manual_seed(seed)
    groups, row = [], 0
    for prompt, completions in shapes:
        tokens = [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in (prompt, *completions)]
        groups.append(Group(tokens[0], tokens[1:], list(range(row, row + len(completions)))))
        row += len(completions)
    return groups


def as_batch(groups: Sequence[Group]) -> Rollout:
    """Return the whole batch of groups that all have the same number of completions."""
    completions = [Completion(list(c), [0.0] * len(c), False) for g in groups for c in g.completions]
    return Rollout(
        [list(g.prompt) for g in groups], completions, len(groups[0].completions), advantages=[1.0] * len(completions)
    )


def sampled_difference(base: SharedBase) -> float:
    """Return the mean absolute difference of the policy's log-probs between sampling and the training pass.

    A tenth of the tokens ends a completion, so that rows leave.
    """
    groups = ragged_groups(shapes=[(5, [1, 1, 1]), (9, [1, 1, 1])])
    prompts = [group.prompt for group in groups]
    with pytest.MonkeyPatch.context() as patch, base.role(POLICY), base.decoding(False):
        patch.setattr(base, "tokenizer", tiny_tokenizer(list(range(EOS, VOCAB, 10))))
        drawn = [
            c
            for own in wave_engine(base).generate(prompts, 3, 30, Sampling(), RolloutLimits(6, 64, 16), seed=0)
            for c in own
        ]
    with base.role(POLICY):
        trained = completion_logprobs(base, Rollout(prompts, drawn, 3).groups(range(6)), BatchLimits(1.0, 512, 64))
    return float(torch.cat([(trained[row] - torch.tensor(drawn[row].logps)).abs() for row in trained]).mean())


def byte_tokenizer() -> Any:
    """Return a real tokenizer file's content: one token a byte, ids below 260."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_tiny(family: str, folder: Path, **changes: Any) -> Path:
    """Write a tiny model with its tokenizer as a local model folder; 64 wide, so that NF4 and int8 take it."""
    changes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, **changes}
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
