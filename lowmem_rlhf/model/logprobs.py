"""Log-probs of chosen tokens without ever holding the logits of all positions.

The head is applied to a tile of positions at a time. The backward pass makes each tile's logits again:
``d logp_t / d logits = (onehot(t) - p) / temperature`` and ``d H / d logits = -p (log p + H) / temperature``.
Shapes: T positions, H hidden size, V vocabulary, K positions in a tile. Memory: one (K, V) tile in the compute dtype
and one or two in fp32, whatever T is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


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
        logits = self.module(hidden)
        if self.scale != 1.0:
            logits = logits.float().mul_(self.scale)
        if self.softcap:
            logits = logits.float().div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward(self, grad_logits: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the gradient (K, H) of the head's input for fp32 grad_logits (K, V), which is overwritten.

        Args:
            grad_logits: gradient with respect to the result of `logits`.
            logits: that result (only read when a softcap is set).
            dtype: the compute dtype of the head.
        """
        if self.softcap:
            grad_logits.mul_(1 - (logits / self.softcap).square_())
        if self.scale != 1.0:
            grad_logits.mul_(self.scale)
        return _input_gradient(self.module, grad_logits.to(dtype))


def _input_gradient(linear: nn.Module, grad: torch.Tensor) -> torch.Tensor:
    """Return grad (K, V) times the weight (V, H) of a linear layer, also of a quantized one."""
    if type(linear) is nn.Linear:
        return grad @ linear.weight
    probe = torch.zeros((grad.shape[0], linear.in_features), dtype=grad.dtype, device=grad.device, requires_grad=True)  # type: ignore[arg-type]
    with torch.enable_grad():
        return torch.autograd.grad(linear(probe), probe, grad)[0]


def tiles(length: int, tile: int) -> Iterator[slice]:
    """Yield the slices that cut ``length`` positions into tiles of at most ``tile``, as even as possible."""
    count = -(-length // tile)
    for i in range(count):
        yield slice(i * length // count, (i + 1) * length // count)


def _softmax(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the scaled logits (K, V), their softmax (K, V) in fp32 and log-sum-exp (K,) in fp32."""
    if temperature != 1.0:
        logits = logits.float() / temperature
    p = torch.softmax(logits, dim=-1, dtype=torch.float32)
    top, at = logits.max(dim=-1, keepdim=True)
    return logits, p, (top.float() - p.gather(-1, at).log()).squeeze(-1)  # p at the maximum is at least 1 / V


class _TiledLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, temperature, tile, want_entropy):  # type: ignore[no-untyped-def]
        logps = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropies = torch.zeros_like(logps)
        for part in tiles(hidden.shape[0], tile):
            logits, p, lse = _softmax(head.logits(hidden[part]), temperature)
            logps[part] = logits.gather(-1, targets[part, None]).squeeze(-1).float() - lse
            if want_entropy:
                entropies[part] = lse - p.mul_(logits).sum(-1)
            del logits, p
        ctx.save_for_backward(hidden, targets, entropies)
        ctx.head, ctx.temperature, ctx.tile = head, temperature, tile
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies):  # type: ignore[no-untyped-def]
        hidden, targets, entropies = ctx.saved_tensors
        head, temperature = ctx.head, ctx.temperature
        grad_hidden = torch.empty_like(hidden)
        for part in tiles(hidden.shape[0], ctx.tile):
            raw = head.logits(hidden[part])
            logits, p, lse = _softmax(raw, temperature)
            g: torch.Tensor | None = None
            if grad_entropies is not None:
                log_p = logits.float() - lse[:, None]
                g = log_p.add_(entropies[part, None]).mul_(p).mul_(-grad_entropies[part, None])
            if grad_logps is not None:
                weight = grad_logps[part, None].float()
                p.mul_(-weight).scatter_add_(-1, targets[part, None], weight)
                g = p if g is None else g.add_(p)
            assert g is not None, "autograd calls backward with at least one gradient"
            if temperature != 1.0:
                g.div_(temperature)
            grad_hidden[part] = head.backward(g, raw, hidden.dtype)
            del raw, logits, p, g
        return grad_hidden, None, None, None, None, None


def tiled_logprobs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    temperature: float,
    tile: int,
    want_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies, both (T,) fp32 and differentiable in ``hidden``.

    Args:
        hidden: (T, H) last hidden states, each at the position before its target.
        targets: (T,) token ids.
        head: the output head.
        temperature: the logits are divided by it, as in sampling.
        tile: positions whose logits exist at once.
        want_entropy: whether to compute entropies; zeros otherwise.
    """
    return _TiledLogProbs.apply(hidden, targets, head, temperature, tile, want_entropy)
