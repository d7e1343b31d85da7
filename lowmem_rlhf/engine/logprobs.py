"""Log-probs of chosen tokens without ever holding the logits of all positions.

The head is applied to a tile at a time: some positions by some of the vocabulary. Log-sum-exp and entropy are kept
up from tile to tile (the online softmax of arXiv 1805.02867), and so is the mean of the head's rows under the softmax,
which is all that the gradient needs: ``d logp(t) / d hidden = (W_t - sum_v p_v W_v) / temperature``. The backward pass
only scales it, so each logit is computed once. Sums and exponentials are fp32.

Shapes: T positions, H hidden size, V vocabulary, K positions and C vocabulary entries in a tile. Memory: a (K, C) tile
in the compute dtype and two in fp32, and (T, H) for the gradient, whatever T * V is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lowmem_rlhf.engine.decode.native import few_rows
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.planning.limits import ENOUGH_POSITIONS, tile_shape

Entropy = Literal["none", "value", "gradient"]


@dataclass(frozen=True)
class Head:
    """The frozen output head of a model.

    Attributes:
        module: the linear layer, hidden (.., H) to logits (.., V); of any kind (16-bit, quantized, with bias).
        scale: multiplies the logits (Cohere; 1 / logits_scaling in Granite).
        softcap: ``softcap * tanh(logits / softcap)`` after scaling (Gemma 2); 0: none.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (K, V) of hidden (K, H): in the compute dtype, or fp32 where they are scaled or capped."""
        logits = few_rows(hidden, self.module)
        logits = self.module(hidden) if logits is None else logits
        return logits if self.scale == 1.0 and not self.softcap else self._finished(logits.float())

    @property
    def vocabulary(self) -> int:
        """Number of logits V."""
        return self.module.out_features  # type: ignore[return-value]

    def shape_of_tiles(self, positions: int, tile: int) -> tuple[int, int]:
        """Return (K, C) so that K * C is at most ``tile * V``. Quantized heads are not cut along the vocabulary."""
        if type(self.module) is not nn.Linear:
            return min(positions, max(1, min(ENOUGH_POSITIONS, tile))), self.vocabulary
        return tile_shape(positions, tile, self.vocabulary, capabilities(self.module.weight.device).on_cpu)

    def chunk_logits(self, hidden: torch.Tensor, chunk: slice, into: torch.Tensor, rounded: torch.Tensor) -> None:
        """Write the logits (K, C) of one chunk of the vocabulary, as `logits`, into an fp32 tensor.

        Args:
            rounded: room for (K, C) in the compute dtype.
        """
        if type(self.module) is not nn.Linear:
            into.copy_(self.module(hidden))
        elif self.module.bias is None:
            into.copy_(torch.mm(hidden, self.module.weight[chunk].t(), out=rounded))
        else:
            into.copy_(torch.addmm(self.module.bias[chunk], hidden, self.module.weight[chunk].t(), out=rounded))
        self._finished(into)

    def mean_rows(self, weights: torch.Tensor, chunk: slice, rounded: torch.Tensor) -> torch.Tensor:
        """Return weights (K, C), fp32, times the head's rows (C, H) of a chunk, in the compute dtype.

        Args:
            rounded: room for the weights in the compute dtype.
        """
        rounded.copy_(weights)
        if type(self.module) is nn.Linear:
            return rounded @ self.module.weight[chunk]
        shape: Any = (weights.shape[0], self.module.in_features)
        probe = torch.zeros(shape, dtype=rounded.dtype, device=weights.device, requires_grad=True)
        with torch.enable_grad():  # a quantized layer's own way back
            return torch.autograd.grad(self.module(probe), probe, rounded)[0]

    def _finished(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap fp32 logits in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def possible_heads(model: Any) -> list[Head]:
    """Return the heads that a transformers model may have by what its config says about logits.

    A field does not say which way it scales: ``logits_scaling`` divides in Granite and multiplies in HyperCLOVA X.
    """
    text = model.config.get_text_config()

    def field(*names: str) -> float:
        return next((value for name in names if (value := getattr(text, name, None))), 0.0)

    factor, divisor = field("logit_scale", "lm_head_multiplier"), field("logits_scaling")
    scales = [factor, 1 / factor] if factor else [1 / divisor, divisor] if divisor else [1.0]
    cap = field("final_logit_softcapping", "logits_soft_cap")
    return [Head(model.get_output_embeddings(), scale, cap) for scale in scales]


def tiles(length: int, tile: int) -> Iterator[slice]:
    """Yield the slices that cut ``length`` into parts of at most ``tile``, as even as possible."""
    count = -(-length // tile)
    for i in range(count):
        yield slice(i * length // count, (i + 1) * length // count)


class _Running:
    """Sums over the vocabulary for K positions, relative to the largest logit so far.

    With e = exp(logit - largest) and d = logit - largest: ``total`` sums e, ``spread`` sums e * d; ``rows`` and
    ``spread_rows`` (K, H) sum e W and e d W. ``chosen`` is the targets' logits over the temperature. All are fp32,
    (K, 1) but for the last two. The tile itself lies in room that all chunks share: fresh memory for each would cost
    a CPU more time than the sums.
    """

    def __init__(
        self,
        head: Head,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        entropy: Entropy,
        gradient: bool,
        chunk: int,
    ) -> None:
        self.head, self.hidden, self.targets, self.temperature = head, hidden, targets, temperature
        self.chosen = torch.zeros((targets.shape[0], 1), dtype=torch.float32, device=targets.device)
        self.with_spread = entropy != "none"
        self.with_rows = gradient
        self.with_spread_rows = gradient and entropy == "gradient"
        self.largest: torch.Tensor | None = None
        self.sums: dict[str, torch.Tensor] = {}
        tile, device = hidden.shape[0] * chunk, hidden.device
        self._room = [torch.empty(tile, dtype=torch.float32, device=device) for _ in range(2)]
        self._rounded = torch.empty(tile, dtype=hidden.dtype, device=device)

    def add(self, chunk: slice) -> None:
        """Take in a chunk of the vocabulary."""
        shape = (self.hidden.shape[0], chunk.stop - chunk.start)
        d, e, rounded = (room[: shape[0] * shape[1]].view(shape) for room in (*self._room, self._rounded))
        self.head.chunk_logits(self.hidden, chunk, d, rounded)
        slope = (d / self.head.softcap).square_().neg_().add_(1) if self.head.softcap and self.with_rows else None
        if self.temperature != 1.0:
            d.div_(self.temperature)
        here = (self.targets >= chunk.start) & (self.targets < chunk.stop)
        at = (self.targets - chunk.start).clamp_(0, d.shape[-1] - 1)
        self.chosen += d.gather(-1, at[:, None]) * here[:, None]
        self._move_to_largest(d)
        torch.exp(d, out=e)
        self._sum("total", e.sum(-1, keepdim=True))
        if self.with_spread:
            d.mul_(e)
            self._sum("spread", d.sum(-1, keepdim=True))
        if self.with_rows:
            self._sum("rows", self._rows(e, slope, chunk, rounded))
        if self.with_spread_rows:
            self._sum("spread_rows", self._rows(d, slope, chunk, rounded))

    def _move_to_largest(self, logits: torch.Tensor) -> None:
        """Make logits and sums relative to the largest logit so far, in place."""
        top = logits.amax(-1, keepdim=True)
        if self.largest is not None:
            top = torch.maximum(top, self.largest)
            rise = top - self.largest
            shrink = (-rise).exp_()
            for mean, spread in (("total", "spread"), ("rows", "spread_rows")):
                if spread in self.sums:
                    self.sums[spread].addcmul_(rise, self.sums[mean], value=-1).mul_(shrink)
                if mean in self.sums:
                    self.sums[mean].mul_(shrink)
        self.largest = top
        logits.sub_(top)

    def _rows(
        self, weights: torch.Tensor, slope: torch.Tensor | None, chunk: slice, rounded: torch.Tensor
    ) -> torch.Tensor:
        return self.head.mean_rows(weights if slope is None else weights.mul_(slope), chunk, rounded)

    def _sum(self, name: str, part: torch.Tensor) -> None:
        if name in self.sums:
            self.sums[name].add_(part)
        else:
            self.sums[name] = part.float()

    def chosen_less_largest(self) -> torch.Tensor:
        """Return the targets' logits relative to the largest, (K, 1)."""
        assert self.largest is not None, "no chunk of the vocabulary was added"
        return self.chosen - self.largest

    def mean(self, name: str) -> torch.Tensor:
        """Return a sum over the sum of the exponentials."""
        return self.sums[name] / self.sums["total"]


class _TiledLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, temperature, tile, entropy):  # type: ignore[no-untyped-def]
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros_like(logps)
        gradient = ctx.needs_input_grad[0]
        of_logps = torch.empty_like(hidden) if gradient else None
        of_entropies = torch.empty_like(hidden) if gradient and entropy == "gradient" else None
        positions, chunk = head.shape_of_tiles(hidden.shape[0], tile)
        for part in tiles(hidden.shape[0], positions):
            running = _Running(head, hidden[part], targets[part], temperature, entropy, gradient, chunk)
            for start in range(0, head.vocabulary, chunk):
                running.add(slice(start, min(start + chunk, head.vocabulary)))
            total = running.sums["total"].log()
            logps[part] = (running.chosen_less_largest() - total).squeeze(-1)
            if running.with_spread:
                spread = running.mean("spread")
                entropies[part] = (total - spread).squeeze(-1)
            if of_logps is not None:
                of_logps[part] = _slope(head, running.chosen, temperature) * _rows_of(head, targets[part], hidden.dtype)
                of_logps[part] -= running.mean("rows")
            if of_entropies is not None:
                of_entropies[part] = spread * running.mean("rows") - running.mean("spread_rows")
            del running  # its room is free before the next tile takes its own
        if entropy != "gradient":
            ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(of_logps, of_entropies)
        ctx.factor = head.scale / temperature
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies):  # type: ignore[no-untyped-def]
        grad = None
        for saved, outer in zip(ctx.saved_tensors, (grad_logps, grad_entropies), strict=True):
            if saved is not None and outer is not None:
                part = saved * outer.mul(ctx.factor)[:, None]
                grad = part if grad is None else grad.add_(part)
        return None if grad is None else grad.to(ctx.saved_tensors[0].dtype), None, None, None, None, None


def _slope(head: Head, chosen: torch.Tensor, temperature: float) -> torch.Tensor | float:
    """Return the derivative of the soft cap at the targets' logits, (K, 1); 1 without one."""
    return 1 - (chosen * temperature / head.softcap).square() if head.softcap else 1.0


def _rows_of(head: Head, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the head's rows of the targets, (K, H)."""
    if type(head.module) is nn.Linear:
        return head.module.weight[targets]
    one = torch.zeros((targets.shape[0], head.vocabulary), dtype=dtype, device=targets.device)
    return head.mean_rows(one.scatter_(-1, targets[:, None], 1.0), slice(0, head.vocabulary), one)


def tiled_logprobs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    temperature: float,
    tile: int,
    entropy: Entropy = "value",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies, both (T,) fp32; the log-probs are differentiable in ``hidden``.

    Args:
        hidden: (T, H) last hidden states, each at the position before its target.
        targets: (T,) token ids.
        head: the output head.
        temperature: the logits are divided by it, as in sampling.
        tile: the memory: so many positions' logits exist at once, or as many of more positions and less vocabulary.
        entropy: ``none`` (zeros), ``value``, or ``gradient`` (differentiable too, which costs one more product).
    """
    return _TiledLogProbs.apply(hidden, targets, head, temperature, tile, entropy)
