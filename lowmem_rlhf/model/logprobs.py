"""Log-probs of chosen tokens without ever holding the logits of all positions.

The head is applied to a tile of positions at a time. The backward pass makes each tile's logits again:
``d logp_t / d logits = (onehot(t) - p) / temperature`` and ``d H / d logits = -p (log p + H) / temperature``.
Shapes: T positions, H hidden size, V vocabulary, K positions in a tile. Memory: one (K, V) tile in the compute dtype
and two in fp32, whatever T is.
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
        """Return fp32 logits (K, V) of hidden (K, H)."""
        logits = self.module(hidden).float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
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


class _TiledLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, head, temperature, tile):  # type: ignore[no-untyped-def]
        length = hidden.shape[0]
        logps = torch.empty(length, dtype=torch.float32, device=hidden.device)
        entropies, lses = torch.empty_like(logps), torch.empty_like(logps)
        for part in tiles(length, tile):
            logits = head.logits(hidden[part]).div_(temperature)  # (K, V)
            lses[part] = lse = torch.logsumexp(logits, dim=-1)
            logps[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - lse
            p = (logits - lse[:, None]).exp_()
            entropies[part] = lse - p.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, targets, lses, entropies)
        ctx.head, ctx.temperature, ctx.tile = head, temperature, tile
        return logps, entropies

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies):  # type: ignore[no-untyped-def]
        hidden, targets, lses, entropies = ctx.saved_tensors
        head, temperature = ctx.head, ctx.temperature
        grad_hidden = torch.empty_like(hidden)
        use_entropy = grad_entropies is not None and bool(torch.count_nonzero(grad_entropies))
        for part in tiles(hidden.shape[0], ctx.tile):
            raw = head.logits(hidden[part])
            log_p = (
                (raw / temperature).sub_(lses[part, None])
                if head.softcap
                else raw.div_(temperature).sub_(lses[part, None])
            )
            g = log_p.exp().mul_(-grad_logps[part, None])  # (K, V)
            if use_entropy:
                h = entropies[part, None]
                g.sub_((log_p + h).mul_(log_p.exp()).mul_(grad_entropies[part, None]))
            del log_p
            g.scatter_add_(-1, targets[part, None], grad_logps[part, None].to(g.dtype))
            grad_hidden[part] = head.backward(g.div_(temperature), raw, hidden.dtype)
        return grad_hidden, None, None, None, None


def tiled_logprobs(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, temperature: float, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies, both (T,) fp32 and differentiable in ``hidden``.

    Args:
        hidden: (T, H) last hidden states, each at the position before its target.
        targets: (T,) token ids.
        head: the output head.
        temperature: the logits are divided by it, as in sampling.
        tile: positions whose logits exist at once.
    """
    return _TiledLogProbs.apply(hidden, targets, head, temperature, tile)
