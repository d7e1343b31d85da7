"""What the fields of a config.json say, whatever they are called: numbers that are plausible, heads, windows, caps."""

from collections.abc import Mapping
from typing import Any

from lowmem_rlhf.architecture.families.block import Block, activation_of
from lowmem_rlhf.errors import UserError

# the most of each that is no sign of a damaged file: far above the largest dense model
LIMITS = {
    "hidden_size": 1 << 17,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 23,
}
_MORE_LIMITS = {"num_key_value_heads": 1 << 12, "head_dim": 1 << 12, "max_position_embeddings": 1 << 31}

_OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "ffn_dim": "intermediate_size",
}


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without nulls, with the field names of GPT-2 and OPT turned into the common ones."""
    fields = {key: value for key, value in config.items() if value is not None}
    for old, new in _OTHER_NAMES.items():
        if old in fields:
            fields.setdefault(new, fields[old])
    if isinstance(fields.get("n_embd"), int):
        fields.setdefault("intermediate_size", 4 * fields["n_embd"])
    return fields


def positive(value: Any, key: str, model: str) -> int:
    """Return a field of a config or a GGUF header that has to be a whole number of at least 1.

    Raises:
        UserError: it is anything else, or larger than any model's.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"model {model!r}: its config gives {key} = {value!r}; a whole number of at least 1 is expected"
        )
    limit = LIMITS.get(key) or _MORE_LIMITS.get(key)
    if limit and value > limit:
        raise UserError(
            f"model {model!r}: its config gives {key} = {value}; no model has more than {limit}, so the file is "
            "damaged; fetch it again"
        )
    return value


def heads_of(fields: Mapping[str, Any], block: Block, numbers: Mapping[str, int], model: str) -> tuple[int, int, int]:
    """Return query heads, key/value heads and the dimension of one.

    Raises:
        UserError: they do not divide, or the embeddings are not as wide as the layers.
    """
    hidden, heads = numbers["hidden_size"], numbers["num_attention_heads"]
    stated_kv_heads = fields.get("num_key_value_heads", heads) if block.grouped else heads
    kv_heads = positive(stated_kv_heads, "num_key_value_heads", model)
    if heads % kv_heads:
        raise UserError(
            f"model {model!r}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = fields.get("head_dim", block.head_dim)
    if head_dim is None and hidden % heads:
        raise UserError(
            f"model {model!r}: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and its config.json "
            "has no head_dim"
        )
    if (width := fields.get("word_embed_proj_dim", hidden)) != hidden:
        raise UserError(
            f"model {model!r}: its embeddings are {width} wide and its layers {hidden} (word_embed_proj_dim); take a "
            "model where both are the same"
        )
    return heads, kv_heads, positive(hidden // heads if head_dim is None else head_dim, "head_dim", model)


def block_traits(block: Block, config: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Return what decides the memory of a block beside its sizes, under the names of `ModelDimensions`.

    Raises:
        TypeError, ValueError, OverflowError: a field is of the wrong kind.
    """
    window, windowed = sliding_layers(block, config)
    attention_cap, logit_cap = block.softcaps
    return {
        "norm": block.norm,
        "norms": block.norms,
        "norm_place": block.norm_place,
        "qk_norm": block.qk_norm,
        "parallel": block.parallel,
        "activation": activation_of(config) or block.activation,
        "rotary_dim": 0 if block.learned_positions else int(dim * _rotary_part(block, config)),
        "attention_softcap": _cap(config.get("attn_logit_softcapping", attention_cap)),
        "logit_softcap": _cap(config.get("final_logit_softcapping", logit_cap)),
        "embedding_scale": block.embedding_scale,
        "sliding_window": window,
        "sliding_layers": windowed,
    }


def sliding_layers(block: Block, config: Mapping[str, Any]) -> tuple[int | None, int]:
    """Return the window in tokens and the number of layers that have it; (None, 0) where all attend to everything.

    A field that is null means no window; one that is missing means the family's default.
    """
    window = int(config.get("sliding_window", block.window) or 0)
    layers = int(config["num_hidden_layers"])
    if window < 0:
        raise ValueError(f"sliding_window {window}")
    if not window or (block.window_opt_in and not config.get("use_sliding_window")):
        return None, 0
    if kinds := config.get("layer_types"):
        count = list(kinds).count("sliding_attention")
    elif block.window_opt_in:
        first = config.get("max_window_layers")
        count = max(0, layers - (28 if first is None else int(first)))
    else:
        every = int(config.get("sliding_window_pattern") or block.full_every)
        if every < 0:
            raise ValueError(f"sliding_window_pattern {every}")
        count = layers - layers // every if every else layers
    return (window, count) if count else (None, 0)


def _cap(value: Any) -> float | None:
    return float(value) if value else None


def _rotary_part(block: Block, config: Mapping[str, Any]) -> float:
    for section in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        for name in ("partial_rotary_factor", "rotary_pct"):
            if isinstance(section, Mapping) and section.get(name) is not None:
                part = float(section[name])
                if not 0 <= part <= 1:
                    raise ValueError(f"{name} {part}")
                return part
    return block.rotary
