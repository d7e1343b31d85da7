"""What GGUF says of a model's architecture: llama.cpp's metadata, from a transformers configuration.

Where llama.cpp computes otherwise than the model, the model is refused, or a sentence says from where on they differ.
Sources: llama.cpp's src/models/*.cpp (what is read and computed) and gguf.constants (the names).
"""

import math
from dataclasses import dataclass, field
from typing import Any

from lowmem_rlhf.engine.gguf_source import BIG_GEMMA_LAYERS
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.tokenizer import WAY_OUT

Value = bool | int | float | str | list[bool]
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Family:
    """How a transformers model type is laid out in a GGUF.

    Attributes:
        arch: llama.cpp's name.
        activations: the ones that llama.cpp computes.
        pairs_rows: rows of the query and key weights are ordered so that the two halves of a rotation lie together.
        shifts_norms: norms are stored as weight + 1.
        transposed: linear layers are stored as (inputs, outputs), as GPT-2 has them.
        window_every: one layer in so many attends to all tokens where the others have a window; 0: llama.cpp knows no
            window here.
    """

    arch: str
    activations: tuple[str, ...] = _SILU
    pairs_rows: bool = False
    shifts_norms: bool = False
    transposed: bool = False
    window_every: int = 0


FAMILIES = {
    "llama": Family("llama", pairs_rows=True),
    "mistral": Family("llama", pairs_rows=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", _GELU, shifts_norms=True),
    "gemma2": Family("gemma2", _GELU, shifts_norms=True, window_every=2),
    "gemma3_text": Family("gemma3", _GELU, shifts_norms=True, window_every=6),
    "phi3": Family("phi3"),
    "gpt2": Family("gpt2", ("gelu_new",), transposed=True),
}


@dataclass
class Architecture:
    """A model in llama.cpp's words.

    Attributes:
        keys: metadata; names without the leading architecture.
        factors: small fp32 tensors that scale the rotary frequencies, by GGUF name.
        notes: sentences on where llama.cpp computes otherwise.
    """

    family: Family
    keys: dict[str, Value] = field(default_factory=dict)
    factors: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe(config: Any) -> Architecture:
    """Return the metadata of a transformers configuration.

    Raises:
        UserError: our writer does not know the family, or llama.cpp does not compute what the model does.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"no GGUF is written here of the model type {config.model_type}, only of {known}; {WAY_OUT}")
    result = Architecture(family)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if (activation or config.activation_function) not in family.activations:
        raise _otherwise(f"{activation or config.activation_function} in its feed-forward layers")
    if family.arch == "gpt2":
        _gpt2(config, result)
    else:
        _decoder(config, result)
        _rope(config, result)
        _windows(config, result)
    return result


def _otherwise(what: str) -> UserError:
    return UserError(f"llama.cpp does not compute this model: it has {what}; take --format merged")


def head_dim(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _gpt2(config: Any, result: Architecture) -> None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise _otherwise("attention scaled by layer, or not at all")
    result.keys |= {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _decoder(config: Any, result: Architecture) -> None:
    arch, dim = result.family.arch, head_dim(config)
    result.keys |= {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": dim,
        "attention.value_length": dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(dim * _rope_parameters(config).get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    for name, allowed in (("attn_logit_softcapping", ("gemma2",)), ("final_logit_softcapping", ("gemma2", "gemma3"))):
        if cap := getattr(config, name, None):
            if arch not in allowed:
                raise _otherwise(f"{name}={cap}")
            result.keys[name] = float(cap)
    if getattr(config, "attention_bias", False) and arch != "llama":
        raise _otherwise("biases in its attention's output")
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        big = config.num_hidden_layers == BIG_GEMMA_LAYERS.get(arch)
        computed = config.hidden_size // config.num_attention_heads if big else dim
        if scalar != computed:
            raise _otherwise(f"query_pre_attn_scalar={scalar}, and llama.cpp takes {computed}")


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Return the rotary parameters, of the layers that attend to all tokens where there are two kinds."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get("full_attention", parameters))


def _rope(config: Any, result: Architecture) -> None:
    """Add the rotary frequencies and how they are stretched."""
    rope = _rope_parameters(config)
    kind = rope.get("rope_type", "default")
    result.keys["rope.freq_base"] = float(rope["rope_theta"])
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local and result.family.arch == "gemma3":
        result.keys["rope.freq_base_swa"] = float(local["rope_theta"])
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", config.max_position_embeddings
    )
    if kind == "linear":
        result.keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "llama3" and result.family.arch == "llama":
        result.factors["rope_freqs.weight"] = _llama3_factors(rope, head_dim(config), original)
    elif kind == "yarn":
        if given := [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]:
            raise _otherwise(f"YaRN with {given[0]} of its own")
        result.keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                result.keys[f"rope.scaling.yarn_{name}"] = float(rope[name])
    elif kind == "longrope" and result.family.arch == "phi3":
        scale = config.max_position_embeddings / original
        result.keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0,
        }
        result.factors["rope_factors_long.weight"] = list(map(float, rope["long_factor"]))
        result.factors["rope_factors_short.weight"] = list(map(float, rope["short_factor"]))
    elif kind != "default":
        raise _otherwise(f"rotary positions of the type {kind}")


def _llama3_factors(rope: dict[str, Any], dim: int, original: int) -> list[float]:
    """Return what each of Llama 3.1's rotary frequencies is divided by (transformers' `_compute_llama3_parameters`)."""
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    factors = []
    for index in range(0, dim, 2):
        turns = original / (2 * math.pi * float(rope["rope_theta"]) ** (index / dim))  # over the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _windows(config: Any, result: Architecture) -> None:
    """Add the window of layers that attend to the latest tokens only, or a sentence where llama.cpp has none."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windowed = [kind == "sliding_attention" for kind in kinds]
    if not window or not any(windowed):
        if result.family.arch == "phi3":
            result.keys["attention.sliding_window"] = 0
        return
    if every := result.family.window_every:
        result.keys["attention.sliding_window"] = int(window)
        if windowed != [(index + 1) % every != 0 for index in range(len(windowed))]:
            result.keys["attention.sliding_window_pattern"] = windowed
    elif window < config.max_position_embeddings:
        result.notes.append(
            f"llama.cpp attends to all tokens where this model attends to the latest {window}: on texts longer than "
            "that its answers differ"
        )
