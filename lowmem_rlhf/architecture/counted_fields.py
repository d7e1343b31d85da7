"""The sizes of a model whose type has no terms here, from the linear layers of its class and from its config.

A layer's activations are estimated from these as Llama's are; a size that neither tells is left out.
"""

from collections.abc import Mapping
from typing import Any

from lowmem_rlhf.architecture.counting import Counted
from lowmem_rlhf.architecture.families.block import Linear

_KEYS = ("k_proj", "key", "key_proj")
_FUSED = ("query_key_value", "Wqkv", "qkv_proj", "c_attn", "qkv")


def counted_fields(counted: Counted, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return sizes under the common names of a config's fields.

    Args:
        named: what the class of the config says of them, under the same names.
    """
    fields = dict(named)
    vocabulary, heads = named.get("vocab_size"), named.get("num_attention_heads")
    if not fields.get("hidden_size") and vocabulary:
        fields["hidden_size"] = counted.embedding // vocabulary
    hidden = fields.get("hidden_size")
    if not hidden:
        return fields
    down = [linear.inputs for linear in counted.block if linear.outputs == hidden]
    fields["intermediate_size"] = max(down, default=named.get("intermediate_size") or 4 * hidden)
    if heads:
        dim = named.get("head_dim") or _of("q_proj", counted.block, heads) or hidden // heads or 1
        kv_heads = _kv_heads(counted.block, heads, dim) or named.get("num_key_value_heads") or heads
        fields |= {"head_dim": dim, "num_key_value_heads": kv_heads if heads % kv_heads == 0 else heads}
    return fields


def is_gated(counted: Counted, hidden: int, inner: int) -> bool:
    """Whether the MLP has a gate: two products of its inner size, or one of twice that."""
    up = [linear.outputs for linear in counted.block if linear.inputs == hidden]
    return up.count(inner) > 1 or 2 * inner in up


def _of(name: str, block: tuple[Linear, ...], heads: int) -> int:
    return next((x.outputs // heads for x in block if x.name == name and x.outputs % heads == 0), 0)


def _kv_heads(block: tuple[Linear, ...], heads: int, dim: int) -> int:
    """Return the key heads that the key product of a layer has room for; 0 where no layer is known to be one."""
    for linear in block:
        if linear.name in _KEYS:
            return linear.outputs // dim
        if linear.name in _FUSED:
            return (linear.outputs // dim - heads) // 2
    return 0
