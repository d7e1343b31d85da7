"""What GGUF says of a model's architecture: llama.cpp's metadata, from a transformers configuration.

Where llama.cpp computes otherwise than the model, the model is refused, or a sentence says from where on they differ.
How llama.cpp has a family stands in the family's row (`architecture.families`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem_rlhf.architecture.families import FAMILIES, family_of
from lowmem_rlhf.architecture.families.layers import gemma4
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


def _no_experts(experts: Any) -> None:
    if experts:
        raise UserError(f"the model has experts, of which no GGUF is written here; {WAY_OUT}")


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


def _with_scans(config: Any, metadata: GGUFMetadata) -> None:
    """Add the metadata of Granite 4: as Granite's where all layers have attention, with Mamba 2's sizes where not."""
    _no_experts(config.num_local_experts)
    attending = [kind in ("attention", "full_attention") for kind in config.layers_block_type]
    if all(attending):
        metadata.layout = replace(metadata.layout, name="granite")
    _with_rotary_positions(config, metadata)
    turned = config.position_embedding_type == "rope"
    metadata.keys |= {"feed_forward_length": config.shared_intermediate_size, "rope.scaling.finetuned": turned}
    if all(attending):
        return
    if config.mamba_proj_bias:
        raise _otherwise("biases in its mixers' products")
    metadata.keys |= {
        "attention.head_count_kv": [config.num_key_value_heads if one else 0 for one in attending],
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_expand * config.hidden_size,
        "ssm.time_step_rank": config.mamba_n_heads,
    }


def _with_delta_rules(config: Any, metadata: GGUFMetadata) -> None:
    """Add the metadata of Qwen3.5."""
    _with_rotary_positions(config, metadata)
    every = next((place + 1 for place, kind in enumerate(config.layer_types) if kind == "full_attention"), 0)
    if not every or config.layer_types != [
        "linear_attention" if (place + 1) % every else "full_attention" for place in range(config.num_hidden_layers)
    ]:
        raise _otherwise("attention in other layers than one of so many")
    sections = list(_rope_parameters(config).get("mrope_section") or [])
    # text has one position a token, so how they are cut says nothing
    half = int(head_dim(config) * _rope_parameters(config).get("partial_rotary_factor", 1.0)) // 2
    metadata.keys |= {
        "full_attention_interval": every,
        "rope.dimension_sections": [*sections, *[0] * (4 - len(sections))]
        if sections
        else [half - 2 * (half // 3), half // 3, half // 3, 0],
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }


def _with_unlike_layers(config: Any, metadata: GGUFMetadata) -> None:
    """Add the metadata of Gemma 4."""
    _no_experts(config.enable_moe_block)
    if config.attention_bias or config.use_bidirectional_attention == "all":
        raise _otherwise("biases in its attention, or attention to what follows")
    sizes = gemma4(config.to_dict())
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    local = {one.head_dim for one, near in zip(sizes, windowed, strict=True) if near}
    everywhere = {one.head_dim for one, near in zip(sizes, windowed, strict=True) if not near}
    if len(local) != 1 or len(everywhere) != 1:
        raise _otherwise("heads of several widths among its layers with a window, or among the others")
    (near,), (far,) = local, everywhere
    kinds = config.rope_parameters
    wide = kinds["full_attention"]
    if wide.get("rope_type") != "proportional" or kinds["sliding_attention"].get("rope_type") != "default":
        raise _otherwise("rotary positions of other types than Gemma 4's")
    if wide.get("factor") not in (None, 1, 1.0):
        raise _otherwise(f"rotary positions divided by {wide['factor']}")
    turned = int(far * wide.get("partial_rotary_factor", 1.0) / 2)
    metadata.factors["rope_freqs.weight"] = [1.0] * turned + [1e30] * (far // 2 - turned)
    metadata.keys |= {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        "feed_forward_length": [one.intermediate_size for one in sizes],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [one.num_kv_heads for one in sizes],
        "attention.key_length": far,
        "attention.value_length": far,
        "attention.key_length_swa": near,
        "attention.value_length_swa": near,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": int(config.sliding_window),
        "attention.sliding_window_pattern": windowed,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "rope.freq_base": float(wide["rope_theta"]),
        "rope.freq_base_swa": float(kinds["sliding_attention"]["rope_theta"]),
        "rope.dimension_count": far,
        "rope.dimension_count_swa": near,
        "vocab_size": config.vocab_size,
    }
    # where nothing is said, llama.cpp takes a cap of 30
    metadata.keys["final_logit_softcapping"] = float(config.final_logit_softcapping or 0.0)


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
        own = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name) is not None]
        if metadata.layout.attention_factors:
            metadata.keys["rope.scaling.yarn_log_multiplier"] = float(rope.get("mscale_all_dim") or 0.0)
            metadata.keys["attention.temperature_scale"] = float(rope.get("llama_4_scaling_beta") or 0.0)
        elif own:
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
    "scan": _with_scans,
    "delta": _with_delta_rules,
    "unlike": _with_unlike_layers,
}
