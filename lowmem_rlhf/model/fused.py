"""Norms and feed-forward layers of stock models with fewer operations and less memory for the backward pass.

Stock RMSNorm keeps fp32 copies of its input for the backward pass, a gated MLP keeps the activated gate, and GPT-2's
GELU, written out in Python, five tensors. All are put in place of the stock forward only where they compute the same
numbers, which is tried out on each module; whatever differs keeps its own forward.

Shapes: (.., H) for norms, (T, F) for the gate and up projections of an MLP.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

GATED_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # the parts of one


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm, rounded where the stock module rounds: before a weight of x's dtype, after an fp32 one (Gemma's 1 + w)."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` (arXiv 1910.07467) with a frozen weight; keeps x alone."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normed(x, weight, eps)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        normed = x.float()
        scale = (normed.square().mean(-1, keepdim=True) + ctx.eps).rsqrt_()
        normed = normed * scale
        outer = (grad * weight).float()
        inner = (outer * normed).mean(-1, keepdim=True)
        return outer.addcmul_(normed, inner, value=-1).mul_(scale).to(x.dtype), None, None


class _GatedActivation(torch.autograd.Function):
    """``activation(gate) * up``; keeps gate and up alone."""

    @staticmethod
    def forward(ctx, gate, up, activation, slope):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.slope = activation, slope
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        return ctx.slope(grad * up, gate), ctx.activation(gate).mul_(grad), None, None


# an activation and, from a gradient and its input, the gradient of that
ACTIVATIONS: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (F.silu, torch.ops.aten.silu_backward.default),
    (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward.default, approximate="tanh")),
    (F.gelu, torch.ops.aten.gelu_backward.default),
)


def _rms_norm(weight: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps)


def _gated_mlp(module: Any, activation: tuple[Callable[..., Any], Callable[..., Any]], x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.is_grad_enabled():
        return module.down_proj(_GatedActivation.apply(gate, up, *activation))
    return module.down_proj(activation[0](gate).mul_(up))


@torch.no_grad()
def fuse(model: nn.Module, dtype: torch.dtype) -> int:
    """Put the fused forwards into a frozen model of this compute dtype; return how many modules took one."""
    kinds = (_fuse_norm, partial(_fuse_mlp, dtype=dtype), _fuse_gelu)
    return sum(any(fuse_kind(module) for fuse_kind in kinds) for module in list(model.modules()))


def _fuse_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not torch.is_tensor(weight) or not isinstance(eps, float):
        return False
    x = _trial(weight.numel(), weight.dtype, weight.device)
    return any(_take(module, partial(_rms_norm, scale, eps), x) for scale in (weight, 1.0 + weight.float()))


def _fuse_gelu(module: nn.Module) -> bool:
    """GPT-2's GELU by its formula is torch's ``tanh`` approximation, which keeps its input alone."""
    if type(module).__name__ != "NewGELUActivation":
        return False
    return _take(module, ACTIVATIONS[1][0], _trial(64, torch.float32, torch.device("cpu")))


def _fuse_mlp(module: Any, dtype: torch.dtype) -> bool:
    if {name for name, _ in module.named_children()} != GATED_MLP:
        return False
    device = next(module.parameters()).device
    x = _trial(64, torch.float32, device)
    kind = next((kind for kind in ACTIVATIONS if _equal(kind[0](x), module.act_fn(x))), None)
    if kind is None:
        return False
    return _take(module, partial(_gated_mlp, module, kind), _trial(module.gate_proj.in_features, dtype, device))


def _trial(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return (3, width) numbers of all sizes up to 8, of either sign."""
    ramp = torch.linspace(-4, 4, 3 * width, dtype=torch.float32, device=device)
    return (ramp * (1 + (7 * ramp).sin())).view(3, width).to(dtype)


def _equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Say whether two results differ by rounding only."""
    if got.dtype != want.dtype:
        return False
    return bool((got - want).float().norm() <= 4 * torch.finfo(want.dtype).eps * want.float().norm())


def _take(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    """Give a module this forward if its own has the same result."""
    if same := _equal(forward(x), module(x)):
        module.forward = forward  # type: ignore[method-assign]
    return same
