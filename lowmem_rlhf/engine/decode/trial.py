"""Whether a model takes the fast decoder: its stock modules are held against it, layer by layer and in fp32.

What a layer computes is decided in fp32, with small stand-ins for its products: the stock layer's own forward and the
fast one's, on the same numbers. What stands around the layers (embedding, positions, last norm) has to be the very same
numbers. With the real products, in the compute dtype, only rounding may then differ, and that is looked at as well.

Shapes: T tokens, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lowmem_rlhf.engine.attention import PackedContext
from lowmem_rlhf.engine.decode.fast_decoder import FastDecoder, FastDecoderLayer, fast_layer, rotary_tables
from lowmem_rlhf.engine.packing import Bucket
from lowmem_rlhf.engine.trial import norm_weights, nudged, rows_within_noise, twin
from lowmem_rlhf.hardware.memory import is_out_of_memory

TRIAL_TOKENS = 6
RANK = 8  # of the stand-ins for products
CLOSE = 1e-5  # of the largest number of a row, in fp32
CONTEXT = "lowmem_context"


class _Observed(PackedContext):
    """A context that notes with which scaling, window and soft cap each layer calls it."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        super().__init__([Bucket(0, 1, tokens, ())], device)
        self.seen: dict[int, tuple[float, int | None, float | None]] = {}

    def attend(self, layer: int, *args: Any) -> torch.Tensor:
        self.seen[layer] = args[3:]  # type: ignore[assignment]
        return super().attend(layer, *args)


@dataclass
class _Call:
    """How a stock layer was called, and what it gave, (1, T, H)."""

    x: torch.Tensor
    others: dict[str, Any]
    result: torch.Tensor = field(init=False)


@torch.no_grad()
def try_fast_decoder(base: Any) -> FastDecoder | None:
    """Return the fast decoder of a SharedBase; None where its layers are of another shape or compute anything else."""
    decoder = base.decoder
    blocks = list(getattr(decoder, "layers", ()))
    if not blocks or not {"embed_tokens", "norm", "rotary_emb"} <= {name for name, _ in decoder.named_children()}:
        return None
    ids = torch.arange(TRIAL_TOKENS, dtype=torch.long, device=base.device)[None]
    # the last positions that the model was made for: what depends on them (Ministral's scale of queries) shows there
    last = getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or TRIAL_TOKENS
    positions = ids + max(0, last - TRIAL_TOKENS)
    observed = _Observed(TRIAL_TOKENS, base.device)
    with _watched(blocks) as calls:
        states = base.hidden_states(ids, positions, observed)
    fast_layers = [fast_layer(block, observed.seen.get(i)) for i, block in enumerate(blocks)]
    layers = [layer for layer in fast_layers if layer is not None]
    if not len(layers) == len(calls) == len(blocks) or not _same_around(decoder, calls, ids, positions, states):
        return None
    for number, one in enumerate(zip(blocks, layers, calls, strict=True)):
        if not _same_form(decoder, *one, number, positions) or not _same_numbers(decoder, *one, number, positions):
            return None
    return FastDecoder(decoder, layers)


@contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[list[_Call]]:
    """Note every layer's call inside the block; of one that is not called with its input first, none."""
    calls: list[_Call] = []

    def before(module: nn.Module, args: tuple[Any, ...], others: dict[str, Any]) -> None:
        if len(args) == 1:
            calls.append(_Call(args[0], others))

    def after(module: nn.Module, args: tuple[Any, ...], others: dict[str, Any], result: Any) -> None:
        if len(args) == 1:
            calls[-1].result = result[0] if isinstance(result, tuple) else result

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _same_around(
    decoder: Any, calls: Sequence[_Call], ids: torch.Tensor, positions: torch.Tensor, states: torch.Tensor
) -> bool:
    """Say whether nothing happens before, between and behind the layers that the fast decoder does not do."""
    x = decoder.embed_tokens(ids)
    tables = decoder.rotary_emb(x, positions)
    if any(table.dtype != x.dtype for table in tables):  # heads are turned in fp32 (OLMo)
        return False
    for call in calls:
        own_tables = call.others.get("position_embeddings")
        if not torch.equal(call.x, x) or not isinstance(own_tables, tuple) or len(own_tables) != 2:
            return False
        if not all(torch.equal(one, table) for one, table in zip(own_tables, tables, strict=True)):
            return False
        x = call.result
    return torch.equal(decoder.norm(x)[0], states)


class _Product(nn.Module):
    """Stands for a linear layer: an fp32 product of low rank with a bias, so that it is small whatever its widths."""

    def __init__(self, layer: Any, seed: int) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return x.to(layer.base_layer.weight.device)

        self.down = normal(layer.in_features, RANK) * layer.in_features**-0.5
        self.up, self.bias = normal(RANK, layer.out_features) * RANK**-0.5, 0.1 * normal(layer.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.down @ self.up + self.bias


class _Products:
    """Stands for `GroupedLoraLinear`."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts

    def results(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part(x) for part in self._parts]

    def concatenated(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.results(x), dim=-1)


def _norm_twin(norm: Any, number: int) -> nn.Module:
    """Return a norm of the same class with an fp32 weight that is near one and not the same everywhere."""
    if not isinstance(getattr(norm, "weight", None), nn.Parameter):
        return twin(norm)
    near_one = next(norm_weights(norm.weight.numel())).roll(number)
    return twin(norm, weight=near_one.to(norm.weight.device))


def _same_form(
    decoder: Any, block: Any, layer: FastDecoderLayer, call: _Call, number: int, positions: torch.Tensor
) -> bool:
    """Say whether the stock and the fast layer compute the same in fp32, their products replaced by small stand-ins."""
    groups = (layer.qkv, layer.out, layer.gate_up, layer.down)
    linears = [one for group in groups for one in group.layers]
    products = {one: _Product(one, seed) for seed, one in enumerate(linears)}
    attention_parts: dict[str, nn.Module] = {
        name: products.get(child) or _norm_twin(child, 3)  # type: ignore[call-overload]
        for name, child in block.self_attn.named_children()
    }
    mlp_parts: dict[str, nn.Module] = {
        name: products[child] for name, child in block.mlp.named_children() if child in products
    }
    norms = [_norm_twin(norm, place) for place, norm in enumerate(layer.norms)]
    stock = twin(
        block,
        {
            "self_attn": twin(block.self_attn, attention_parts),
            "mlp": twin(block.mlp, mlp_parts),
            "input_layernorm": norms[0],
            "post_attention_layernorm": norms[1],
        },
    )
    stand_ins: dict[str, Any] = {
        name: _Products([products[one] for one in group.layers])
        for name, group in zip(("qkv", "out", "gate_up", "down"), groups, strict=True)
    }
    fast = replace(
        layer,
        attention_norm=norms[0],
        mlp_norm=norms[1],
        head_norms=None if layer.head_norms is None else (attention_parts["q_norm"], attention_parts["k_norm"]),
        **stand_ins,
    )
    generator = torch.Generator(device="cpu").manual_seed(number)
    x = torch.randn(call.x.shape, generator=generator, dtype=torch.float32, device="cpu").to(call.x.device)
    tables = tuple(table.float() for table in decoder.rotary_emb(x, positions))
    try:
        want = stock(x, **{**call.others, "position_embeddings": tables, CONTEXT: _context(x)})
        got = fast.run(number, x[0], *rotary_tables(decoder, x, positions), _context(x))
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:  # it uses its parts in another way
        if is_out_of_memory(error):
            raise
        return False
    change, wanted = got - x[0], (want[0] if isinstance(want, tuple) else want)[0] - x[0]
    return bool(((change - wanted).abs() <= CLOSE * wanted.abs().amax(-1, keepdim=True)).all())


def _same_numbers(
    decoder: Any, block: Any, layer: FastDecoderLayer, call: _Call, number: int, positions: torch.Tensor
) -> bool:
    """Say whether the fast layer, with the real products in the compute dtype, differs by rounding only."""
    others = {**call.others, CONTEXT: _context(call.x)}
    moved = block(nudged(call.x), **others)
    got = layer.run(number, call.x[0], *rotary_tables(decoder, call.x, positions), _context(call.x))
    return rows_within_noise(got, call.result[0], (moved[0] if isinstance(moved, tuple) else moved)[0], call.x[0])


def _context(x: torch.Tensor) -> PackedContext:
    return PackedContext([Bucket(0, 1, x.shape[1], ())], x.device)
