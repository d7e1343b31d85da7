"""What GGUF says of a model's architecture: llama.cpp's metadata, from a transformers configuration.

Where llama.cpp computes otherwise than the model, the model is refused, or a sentence says from where on they differ.
How llama.cpp has a family stands in the family's row (`architecture.families`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowmem_rlhf.architecture.families import FAMILIES, family_of
from lowmem_rlhf.architecture.families.row import GGUFArchitecture
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.tokenizer import WAY_OUT

Value = bool | int | float | str | list[bool] | list[int]


@dataclass
class GGUFMetadata:
    """A model in llama.cpp's words.

    Attributes:
        layout: how llama.cpp has its family.
        keys: names without the leading architecture.
        factors: small fp32 tensors that scale the rotary frequencies, by GGUF name.
        notes: sentences on where llama.cpp computes otherwise.
    """

    layout: GGUFArchitecture
    keys: dict[str, Value] = field(default_factory=dict)
    factors: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe(config: Any) -> GGUFMetadata:
    """Return the metadata of a transformers configuration.

    Raises:
        UserError: our writer does not know the family, or llama.cpp does not compute what the model does.
    """
    layout = family_of(config.model_type).gguf
    if layout is None or layout.metadata is None:
        known = sorted(name for name, family in FAMILIES.items() if family.gguf and family.gguf.metadata)
        raise UserError(
            f"no GGUF is written here of the model type {config.model_type}, only of {', '.join(known)}; {WAY_OUT}"
        )
    metadata = GGUFMetadata(layout)
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((one for name in names if (one := getattr(config, name, None))), "silu")
    if activation not in layout.activations:
        raise _otherwise(f"{activation} in its feed-forward layers")
    _DESCRIBE[layout.metadata](config, metadata)
    return metadata


def _otherwise(what: str) -> UserError:
    return UserError(f"llama.cpp does not compute this model: it has {what}; take --format merged")


def head_dim(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _with_learned_positions(config: Any, metadata: GGUFMetadata) -> None:
    """Add the metadata of GPT-2."""
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise _otherwise("attention scaled by layer, or not at all")
    metadata.keys |= {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _with_rotary_positions(config: Any, metadata: GGUFMetadata) -> None:
    """Add the metadata of a model whose config has Llama's names."""
    layout, dim = metadata.layout, head_dim(config)
    metadata.keys |= {
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
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if cap := getattr(config, name, None):
            if name not in layout.softcaps:
                raise _otherwise(f"{name}={cap}")
            metadata.keys[name] = float(cap)
    if getattr(config, "attention_bias", False) and not layout.output_bias:
        raise _otherwise("biases in its attention's output")
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        wide = config.num_hidden_layers == layout.wide_scale_layers
        computed = config.hidden_size // config.num_attention_heads if wide else dim
        if scalar != computed:
            raise _otherwise(f"query_pre_attn_scalar={scalar}, and llama.cpp takes {computed}")
    for name, key in layout.scales.items():
        metadata.keys[key] = float(getattr(config, name))
    if every := layout.position_free:
        turned = [int((index + 1) % every != 0) for index in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != turned:
            raise _otherwise(f"positions in other layers than all but every {every}th")
    _rope(config, metadata)
    _windows(config, metadata)


def _with_convolutions(config: Any, metadata: GGUFMetadata) -> None:
    """Add the metadata of LFM2, some of whose layers have a convolution in place of attention."""
    inner = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        inner = int(2 * inner / 3)
        if config.block_ffn_dim_multiplier is not None:
            inner = int(config.block_ffn_dim_multiplier * inner)
            inner = -(-inner // config.block_multiple_of) * config.block_multiple_of
    heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    metadata.keys |= {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": inner,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "shortconv.l_cache": config.conv_L_cache,
        "vocab_size": config.vocab_size,
    }
    if config.conv_bias:
        raise _otherwise("biases in its convolutions")
    _rope(config, metadata)


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Return the rotary parameters, of the layers that attend to all tokens where there are two kinds."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get("full_attention", parameters))


def _rope(config: Any, metadata: GGUFMetadata) -> None:
    """Add the rotary frequencies and how they are stretched."""
    rope = _rope_parameters(config)
    kind = rope.get("rope_type", "default")
    metadata.keys["rope.freq_base"] = float(rope["rope_theta"])
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local and metadata.layout.window_rope:
        metadata.keys["rope.freq_base_swa"] = float(local["rope_theta"])
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", config.max_position_embeddings
    )
    if kind == "linear":
        metadata.keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "llama3" and kind in metadata.layout.rope_types:
        metadata.factors["rope_freqs.weight"] = _llama3_factors(rope, head_dim(config), original)
    elif kind == "yarn":
        if own := [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]:
            raise _otherwise(f"YaRN with {own[0]} of its own")
        metadata.keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                metadata.keys[f"rope.scaling.yarn_{name}"] = float(rope[name])
    elif kind == "longrope" and kind in metadata.layout.rope_types:
        scale = config.max_position_embeddings / original
        metadata.keys |= {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0,
        }
        metadata.factors["rope_factors_long.weight"] = list(map(float, rope["long_factor"]))
        metadata.factors["rope_factors_short.weight"] = list(map(float, rope["short_factor"]))
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


def _windows(config: Any, metadata: GGUFMetadata) -> None:
    """Add the window of layers that attend to the latest tokens only, or a sentence where llama.cpp has none."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    windowed = [kind == "sliding_attention" for kind in kinds]
    if not window or not any(windowed):
        if metadata.layout.states_no_window:
            metadata.keys["attention.sliding_window"] = 0
        return
    if every := metadata.layout.window_every:
        metadata.keys["attention.sliding_window"] = int(window)
        if windowed != [(index + 1) % every != 0 for index in range(len(windowed))]:
            metadata.keys["attention.sliding_window_pattern"] = windowed
    elif window < config.max_position_embeddings:
        metadata.notes.append(
            f"llama.cpp attends to all tokens where this model attends to the latest {window}: on texts longer than "
            "that its answers differ"
        )


# a family's row names one, by its kind of positions
_DESCRIBE: dict[str, Callable[[Any, GGUFMetadata], None]] = {
    "rotary": _with_rotary_positions,
    "learned": _with_learned_positions,
    "convolutions": _with_convolutions,
}
