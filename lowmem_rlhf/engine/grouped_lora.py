"""The products of layers that are called with the same input, one after another: q, k and v; gate and up.

Their adapters' A are one product, their gradients meet in one tensor, and while decoding their weights may be one
matrix. The result of each is ``y = base(x) + scaling * (x A^T) B^T`` (LoRA, arXiv 2106.09685), computed in the dtype of
x; the frozen weights are made dense again in the backward pass and never kept.

Shapes: T rows of x, n layers, R the sum of their adapters' ranks, ``in`` and ``out`` features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from lowmem_rlhf.engine.lora import SharedLoraLinear

Product = Callable[[torch.Tensor], torch.Tensor]  # x (T, in) -> (T, sum of out), biases included


@dataclass(frozen=True)
class Adapters:
    """The adapters of the current role in the compute dtype.

    Attributes:
        a: (R, in), the A of all layers and adapters.
        ranks: of each, in that order.
        b: for each layer (out, R_i), its B times their scaling.
        columns: for each layer its R_i columns of x A^T.
        scaled: for each layer the rank and the scaling of each of its adapters.
        block: (R, sum of out): every B in its place, for the product of all layers at once; made when decoding.
    """

    a: torch.Tensor
    ranks: list[int]
    b: list[torch.Tensor]
    columns: list[slice]
    scaled: list[list[tuple[int, float]]]
    block: torch.Tensor | None = None

    def take_over(self, other: "Adapters") -> "Adapters":
        """Write the numbers of others of the same shapes into these; return these."""
        for mine, new in zip((self.a, *self.b), (other.a, *other.b), strict=True):
            mine.copy_(new)
        if self.block is not None and other.block is not None:
            self.block.copy_(other.block)
        return self

    def of_layers(self) -> tuple[list[slice], list[torch.Tensor], list[list[tuple[int, float]]]]:
        """Return what there is for each layer: columns, B, ranks and scalings."""
        return self.columns, self.b, self.scaled


class GroupedLoraLinear:
    """Layers with one input. The first that is called computes for all; the others fetch their result."""

    def __init__(self, layers: Sequence["SharedLoraLinear"]) -> None:
        self.layers = list(layers)
        self.outs = [layer.out_features for layer in layers]
        self.decode_product: Product | None = None  # while decoding: the product of all weights at once
        self.max_decode_rows = 0  # of x for it
        self.decode_dtype: torch.dtype | None = None  # of x for it
        self._input: torch.Tensor | None = None
        self._asked: tuple[Any, ...] = ()  # role, version of its weights and gradient mode of what waits
        self._waiting: dict[Any, torch.Tensor] = {}
        self._masters: dict[tuple[str, ...], list[torch.Tensor]] = {}  # A and B of each layer and adapter
        self._cached: tuple[Any, Adapters | None] = (None, None)
        self._held: dict[tuple[tuple[str, ...], torch.dtype], Adapters] = {}  # by adapters and dtype
        self._holds = False
        self.joined: Product | None = None  # of NF4 weights that lie in one tensor, while something holds it

    def output(self, layer: "SharedLoraLinear", x: torch.Tensor) -> torch.Tensor:
        """Return the output (..., out) of one of the layers for x (..., in)."""
        asked = (layer.active.names, layer.active.version, torch.is_grad_enabled())
        if x is not self._input or asked != self._asked or layer not in self._waiting:
            results = self.results(x.reshape(-1, x.shape[-1]))
            self._waiting = dict(zip(self.layers, results, strict=True))
            self._input, self._asked = x, asked
        y = self._waiting.pop(layer)
        if not self._waiting:
            self._input = None
        return y.view(*x.shape[:-1], y.shape[-1])

    def results(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the output (T, out) of every layer for x (T, in)."""
        if self._decodes(x):
            return self.concatenated(x).split(self.outs, dim=-1)
        active, adapters = self.layers[0].active, self.adapters_now(x.dtype)
        if torch.is_grad_enabled():
            return self._with_gradient(x, adapters, self._masters.get(active.names, []))
        return _forward(x, self.layers, adapters, None if adapters is None else x @ adapters.a.t())

    def concatenated(self, x: torch.Tensor) -> torch.Tensor:
        """Return `results` side by side, (T, sum of out)."""
        if not self._decodes(x):
            results = self.results(x)
            return results[0] if len(results) == 1 else torch.cat(list(results), dim=-1)
        assert self.decode_product is not None
        y, adapters = self.decode_product(x), self.adapters_now(x.dtype)
        if adapters is not None:
            assert adapters.block is not None
            y.addmm_(x @ adapters.a.t(), adapters.block)
        return y

    def _decodes(self, x: torch.Tensor) -> bool:
        """Whether there is a product for decoding, and it takes this x."""
        fits = x.shape[0] <= self.max_decode_rows and x.dtype == self.decode_dtype
        return self.decode_product is not None and fits and not torch.is_grad_enabled()

    def adapters_now(self, dtype: torch.dtype) -> Adapters | None:
        """Return the adapters of the current role; None where it has none."""
        active = self.layers[0].active
        return self._adapters(active.names, active.version, dtype) if active.names else None

    def _with_gradient(
        self, x: torch.Tensor, adapters: Adapters | None, masters: list[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        if adapters is None:
            return _Up.apply(x, None, self.layers, None, None)
        contexts: list[Any] = []
        xa = _Down.apply(x, adapters, contexts, *masters[::2])
        return _Up.apply(x, xa, self.layers, adapters, contexts[0], *masters[1::2])

    def _adapters(self, names: tuple[str, ...], version: int, dtype: torch.dtype) -> Adapters | None:
        """Return the role's adapters; the copies are made anew when a master has changed."""
        masters = self._masters.get(names)
        if masters is None:
            masters = [w for layer in self.layers for name in names for w in layer.masters(name)]
            self._masters[names] = masters
        key = (names, version, sum([w._version for w in masters]), dtype, masters[0].device)
        if self._cached[0] != key:
            copies = self._copies(names, dtype)
            if (held := self._held.get((names, dtype))) is not None:
                copies = held.take_over(copies)
            self._cached = (key, copies)
        return self._cached[1]

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the current role's adapters at one place in memory, where new values are written from now on.

        So does a product for decoding that is not a copy of the weights: a captured graph reads both again and again.
        """
        names, self._holds = self.layers[0].active.names, True
        if names and (names, dtype) not in self._held:
            adapters = self.adapters_now(dtype)
            assert adapters is not None
            self._held[names, dtype] = adapters

    def let_go(self) -> None:
        """End what `hold` began."""
        self._held.clear()
        self._holds = False
        self.joined = None

    def end_decoding(self) -> None:
        """Let go of what was made for decoding, unless it is held."""
        if not self._holds:
            self.joined = None

    @torch.no_grad()
    def _copies(self, names: Sequence[str], dtype: torch.dtype) -> Adapters:
        a: list[torch.Tensor] = []
        b: list[torch.Tensor] = []
        columns: list[slice] = []
        scaled: list[list[tuple[int, float]]] = []
        used = 0
        for layer in self.layers:
            pairs = [(*layer.masters(name), layer.scaling[name]) for name in names]
            a += [one.to(dtype) for one, _, _ in pairs]
            scaled.append([(one.shape[0], scaling) for one, _, scaling in pairs])
            b.append(torch.cat([one.mul(scaling).to(dtype) for _, one, scaling in pairs], dim=1))
            columns.append(slice(used, used + b[-1].shape[1]))
            used = columns[-1].stop
        block = torch.block_diag(*(one.t() for one in b)) if self.decode_product is not None else None
        return Adapters(torch.cat(a), [one.shape[0] for one in a], b, columns, scaled, block)

    def set_decode_product(self, product: Product | None, max_rows: int = 0, dtype: torch.dtype | None = None) -> None:
        """Use this product of the layers' weights for up to so many rows of a dtype without gradients; None: no more.

        A product in C reads what it is given as that dtype, so rows of another one never reach it.
        """
        self.decode_product, self.max_decode_rows, self.decode_dtype = product, max_rows, dtype
        self._cached = (None, None)


def _forward(
    x: torch.Tensor, layers: Sequence["SharedLoraLinear"], adapters: Adapters | None, xa: torch.Tensor | None
) -> list[torch.Tensor]:
    """Return each layer's output (T, out) for x and x A^T (T, R)."""
    results = [layer.base_layer(x) for layer in layers]
    if adapters is not None and xa is not None:
        for y, columns, b in zip(results, adapters.columns, adapters.b, strict=True):
            y.addmm_(xa[:, columns], b.t())
    return results


class _Down(torch.autograd.Function):
    """``x A^T`` of all layers, (T, R).

    It keeps what `_Up` needs as well, which therefore keeps nothing: where a layer is computed again for its
    activations, the last product is not, as all that the backward pass needs exists before it.
    """

    @staticmethod
    def forward(ctx, x, adapters, contexts, *masters):  # type: ignore[no-untyped-def]
        xa = x @ adapters.a.t()
        ctx.save_for_backward(x, xa)
        ctx.adapters = adapters
        contexts.append(ctx)
        return xa

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, _ = ctx.unpacked  # by _Up: saved tensors of a checkpoint are unpacked once only
        del ctx.unpacked
        grad_x = grad @ ctx.adapters.a if ctx.needs_input_grad[0] else None
        needed = ctx.needs_input_grad[3:]
        if not any(needed):
            return grad_x, None, None, *(None for _ in needed)
        parts = (grad.t() @ x).split(ctx.adapters.ranks)  # (R, in)
        return grad_x, None, None, *(p.float() if n else None for p, n in zip(parts, needed, strict=True))


class _Up(torch.autograd.Function):
    """Every layer's output from x and x A^T."""

    @staticmethod
    def forward(ctx, x, xa, layers, adapters, down, *masters):  # type: ignore[no-untyped-def]
        ctx.layers, ctx.adapters, ctx.down = layers, adapters, down
        ctx.set_materialize_grads(False)
        return tuple(_forward(x, layers, adapters, xa))

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        grad_x = _input_gradient(ctx.layers, grads) if ctx.needs_input_grad[0] else None
        if ctx.adapters is None:
            return grad_x, None, None, None, None
        ctx.down.unpacked = ctx.down.saved_tensors
        _, xa = ctx.down.unpacked
        grad_xa = torch.zeros_like(xa) if any(grad is None for grad in grads) else torch.empty_like(xa)
        gradients: list[torch.Tensor | None] = []
        for grad, columns, b, scaled in zip(grads, *ctx.adapters.of_layers(), strict=True):
            needed = ctx.needs_input_grad[5 + len(gradients) : 5 + len(gradients) + len(scaled)]
            if grad is None:
                gradients += [None] * len(scaled)
                continue
            torch.mm(grad, b, out=grad_xa[:, columns])
            gradients += _gradients_of_b(grad, xa[:, columns], scaled, needed)
        return grad_x, grad_xa, None, None, None, *gradients


def _gradients_of_b(
    grad: torch.Tensor, xa: torch.Tensor, scaled: Sequence[tuple[int, float]], needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Return the fp32 gradients (out, r) of each adapter's B from that of the layer's output and x A^T (T, R_i)."""
    found: list[torch.Tensor | None] = []
    for part, (_, scaling), wanted in zip(xa.split([r for r, _ in scaled], dim=1), scaled, needed, strict=True):
        if not wanted:
            found.append(None)
            continue
        # in float16 a large factor would overflow before the sum is fp32, and a small one lose digits
        within = scaling if grad.dtype != torch.float16 or 1 <= scaling <= 2 else 1.0
        whole = torch.empty((grad.shape[1], part.shape[1]), dtype=grad.dtype, device=grad.device)
        product = torch.addmm(whole, grad.t(), part, beta=0, alpha=within).float()
        found.append(product if within == scaling else product.mul_(scaling))
    return found


def _input_gradient(layers: Sequence["SharedLoraLinear"], grads: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the sum over the layers of their output's gradient times their weight, (T, in)."""
    total: torch.Tensor | None = None
    for layer, grad in zip(layers, grads, strict=True):
        if grad is not None:
            weight = dense_weight(layer.base_layer, grad.dtype)
            total = grad @ weight if total is None else total.addmm_(grad, weight)
            del weight
    return total


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers (out, in) that a linear layer's weights stand for: 16-bit, int8 or NF4, or GPT-2's Conv1D."""
    weight: Any = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).to(dtype)
    held = next((s for s in (getattr(layer, "state", None), weight) if getattr(s, "CB", None) is not None), None)
    if held is not None:  # LLM.int8: the first call moves the numbers from the weight into the layer's state
        codes, scale = held.CB, held.SCB
        assert codes is not None and scale is not None
        return codes.to(dtype, copy=True).mul_(scale.unsqueeze(1).mul(1 / 127))
    return weight.t() if isinstance(layer, Conv1D) else weight
