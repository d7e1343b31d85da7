"""How llama.cpp stores what transformers stores otherwise: changes of a tensor's numbers, each with its way back.

Sources: llama.cpp's converters (conversion/*.py), whose files its code reads.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lowmem_rlhf.architecture.families.row import GGUFArchitecture


@dataclass(frozen=True)
class Change:
    """A change of a tensor's numbers.

    Attributes:
        apply, undo: from transformers' form to llama.cpp's, and back.
        by_rows: it may be applied to some rows at a time.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    undo: Callable[[torch.Tensor], torch.Tensor]
    by_rows: bool = False


@dataclass(frozen=True)
class Part:
    """What a tensor of transformers becomes in the file, or one of several.

    Attributes:
        name: one that the library's table knows, or llama.cpp's own (``blk...``).
        rows: which of the tensor's rows; None: all.
        changes: of these, in order.
    """

    name: str
    rows: tuple[int, int] | None = None
    changes: tuple[Change, ...] = ()


TRANSPOSED = Change(torch.t, torch.t)
SHIFTED = Change(lambda x: x.float() + 1, lambda x: x - 1, by_rows=True)
NEGATIVE_EXPONENTIAL = Change(lambda x: -x.float().exp(), lambda x: (-x).log(), by_rows=True)


def _paired(heads: int) -> Change:
    """Put row i of a head's first half beside row i of its second: llama.cpp rotates neighbours, transformers halves.

    Of weights (heads * D, ...), of D rows a head.
    """

    def apply(x: torch.Tensor) -> torch.Tensor:
        return x.view(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)

    def undo(x: torch.Tensor) -> torch.Tensor:
        return x.view(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)

    return Change(apply, undo)


def _shaped(*shape: int) -> Change:
    """Give a tensor of one dimension another shape."""
    return Change(lambda x: x.reshape(shape), torch.flatten)


def _tiled(first: int, key_heads: int, of_each: int, dim: int = 0) -> Change:
    """Let value heads lie as (one of each key head, the next of each, ...) and not by key head.

    Args:
        first: rows before them, which stay.
        of_each: value heads of a key head.
        dim: of the values; 1: they are a weight's columns.
    """

    def order(x: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
        head, tail = x.narrow(dim, 0, first), x.narrow(dim, first, x.shape[dim] - first)
        heads = tail.unflatten(dim, (outer, inner, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
        return torch.cat([head, heads], dim=dim)

    return Change(partial(order, outer=key_heads, inner=of_each), partial(order, outer=of_each, inner=key_heads))


def parts_of(name: str, shape: tuple[int, ...], config: Any, layout: GGUFArchitecture) -> list[Part]:
    """Return what a tensor of transformers becomes.

    Args:
        name, shape: as transformers has it.
    """
    if layout.metadata in _OF_KIND and (own := _OF_KIND[layout.metadata](name, shape, config)):
        return own
    if layout.transposed and len(shape) == 2 and re.search(r"\.c_(attn|proj|fc)\.", name):
        return [Part(name, changes=(TRANSPOSED,))]
    if layout.pairs_rows and (heads := _rotated_heads(name, config)):
        return [Part(name, changes=(_paired(heads),))]
    if layout.shifts_norms and name.endswith("norm.weight"):
        return [Part(name, changes=(SHIFTED,))]
    return [Part(name)]


def _rotated_heads(name: str, config: Any) -> int:
    if re.search(r"\.q_proj\.(weight|bias)$", name):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if re.search(r"\.k_proj\.(weight|bias)$", name) else 0


def _of_a_scan(name: str, shape: tuple[int, ...], config: Any) -> list[Part]:
    """Return the parts of Granite 4's tensors that differ: Mamba 2, and gate and up in one."""
    if name.endswith("shared_mlp.input_linear.weight"):
        layer, half = f"blk.{_layer(name)}", shape[0] // 2
        return [Part(f"{layer}.ffn_gate.weight", (0, half)), Part(f"{layer}.ffn_up.weight", (half, shape[0]))]
    if name.endswith("shared_mlp.output_linear.weight"):
        return [Part(f"blk.{_layer(name)}.ffn_down.weight")]
    if name.endswith(".A_log"):
        return [Part(name, changes=(NEGATIVE_EXPONENTIAL, _shaped(-1, 1)))]
    if name.endswith("mamba.D"):
        return [Part(name, changes=(_shaped(-1, 1),))]
    if name.endswith(".dt_bias"):
        return [Part(name.replace(".dt_bias", ".dt_proj.bias"))]
    if name.endswith("mamba.norm.weight"):
        return [Part(name, changes=(_shaped(config.mamba_n_groups, -1),))]
    return []


def _of_a_delta_rule(name: str, shape: tuple[int, ...], config: Any) -> list[Part]:
    """Return the parts of Qwen3.5's tensors that differ."""
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return [Part(name, changes=(SHIFTED,))]
    if ".linear_attn." not in name:
        return []
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    changes: tuple[Change, ...] = ()
    if keys != values and not name.endswith("linear_attn.norm.weight"):
        before = 2 * keys * config.linear_key_head_dim if re.search(r"\.(in_proj_qkv|conv1d)\.", name) else 0
        changes = (_tiled(before, keys, values // keys, dim=1 if ".out_proj." in name else 0),)
    if name.endswith(".A_log"):
        changes = (*changes, NEGATIVE_EXPONENTIAL)
    return [Part(name.replace(".dt_bias", ".dt_proj.bias"), changes=changes)]


def _of_unlike_layers(name: str, shape: tuple[int, ...], config: Any) -> list[Part]:
    return [Part(f"{name}.weight")] if name.endswith("layer_scalar") else []


def _layer(name: str) -> int:
    return int(re.findall(r"layers\.(\d+)\.", name)[0])


# by `GGUFArchitecture.metadata`; nothing for a tensor that is as in other families
_OF_KIND: dict[str, Callable[[str, tuple[int, ...], Any], list[Part]]] = {
    "scan": _of_a_scan,
    "delta": _of_a_delta_rule,
    "unlike": _of_unlike_layers,
}
