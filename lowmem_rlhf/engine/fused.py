"""Norms and feed-forward layers of stock models with fewer operations and less memory for the backward pass.

Stock RMSNorm keeps fp32 copies of its input for the backward pass, a gated MLP keeps the activated gate, and GPT-2's
GELU, written out in Python, five tensors. What a module computes is decided in fp32, on its own forward with weights
and inputs as real models have them (`trial`); then the fused kernel is held, element by element and in its own dtype,
against the formula in fp32. A module that fits no formula, or more than one, keeps its own forward.

Shapes: (.., H) for norms, (T, F) for the gate and up projections of an MLP.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowmem_rlhf.engine.trial import norm_weights, simple_attributes, trial_rows, twin, within_rounding
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.memory import is_out_of_memory

GATED_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # the parts of one
# a card has one kernel each way for a norm, which keeps its input alone; earlier releases of torch write it out
FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm_backward")
FP32 = 4 * torch.finfo(torch.float32).eps  # of the size of inner results: their rounding
OFFSETS = (0.0, 1.0)  # what a norm adds to its weight: nothing (Llama) or one (Gemma)


def _normed(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm, rounded where the stock module rounds: before a scale of x's dtype, after an fp32 one (Gemma's 1 + w).

    With a scale of x's dtype a card has one kernel for all of it, which rounds once.
    """
    if scale.dtype == x.dtype:
        if capabilities(x.device).on_cpu:
            return F.rms_norm(x, x.shape[-1:], None, eps).mul_(scale)
        return F.rms_norm(x, x.shape[-1:], scale, eps)
    return F.rms_norm(x.float(), x.shape[-1:], scale, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * scale`` (arXiv 1910.07467) with a frozen scale; keeps x alone."""

    @staticmethod
    def forward(ctx, x, scale, eps):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return _normed(x, scale, eps)

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
Activation = tuple[Callable[..., Any], Callable[..., Any]]
SILU: Activation = (F.silu, torch.ops.aten.silu_backward.default)
GELU_TANH: Activation = (
    partial(F.gelu, approximate="tanh"),
    partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
)
GELU: Activation = (F.gelu, torch.ops.aten.gelu_backward.default)
ACTIVATIONS = (SILU, GELU_TANH, GELU)


def _rms_norm(scale: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    if FUSED_NORM and scale.dtype == x.dtype and not capabilities(x.device).on_cpu:
        return F.rms_norm(x, x.shape[-1:], scale, eps)
    return _RMSNorm.apply(x, scale, eps) if torch.is_grad_enabled() else _normed(x, scale, eps)


def _gated_mlp(module: Any, activation: Activation, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.is_grad_enabled():
        return module.down_proj(_GatedActivation.apply(gate, up, *activation))
    return module.down_proj(activation[0](gate).mul_(up))


def norm_scale(module: nn.Module) -> torch.Tensor | None:
    """Return what a norm with a fused forward multiplies with, (H,): its own weight, or fp32 numbers; else None."""
    forward = vars(module).get("forward")
    return forward.args[0] if isinstance(forward, partial) and forward.func is _rms_norm else None


def gated_activation(module: nn.Module) -> Activation | None:
    """Return the activation of a gated MLP with a fused forward; None for any other module."""
    forward = vars(module).get("forward")
    return forward.args[1] if isinstance(forward, partial) and forward.func is _gated_mlp else None


@torch.no_grad()
def fuse(model: nn.Module, dtype: torch.dtype) -> int:
    """Put the fused forwards into a frozen model of this compute dtype; return how many modules took one."""
    forms: dict[Any, _NormForm | None] = {}
    count = 0
    for module in list(model.modules()):
        forward = _fused_norm(module, dtype, forms) or _fused_mlp(module, dtype) or _fused_gelu(module)
        if forward is not None:
            module.forward = forward  # type: ignore[method-assign]
            count += 1
    return count


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Let every module have its own forward inside the block."""
    ours = (_rms_norm, _gated_mlp, F.gelu)
    taken = [(m, f) for m in model.modules() if isinstance(f := vars(m).get("forward"), partial) and f.func in ours]
    try:
        for module, _ in taken:
            del module.forward
        yield
    finally:
        for module, forward in taken:
            module.forward = forward  # type: ignore[method-assign]


@dataclass(frozen=True)
class _NormForm:
    """What a norm's class computes: ``offset + weight`` as its scale, rounded to the dtype before or after it."""

    offset: float
    rounds_first: bool

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the scale in the dtype that makes `_normed` round where the module does."""
        return weight if self.rounds_first and not self.offset else weight.float() + self.offset


def _fused_norm(module: nn.Module, dtype: torch.dtype, forms: dict[Any, _NormForm | None]) -> Any:
    """Return the fused forward of an RMSNorm; None where there is none.

    Args:
        forms: of the norms so far, by class, width and settings.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not torch.is_tensor(weight):
        return None
    if (
        weight.dim() != 1
        or len(list(module.parameters())) != 1
        or len(inspect.signature(module.forward).parameters) > 1
    ):
        return None
    key = (type(module), weight.shape, weight.dtype, simple_attributes(module))
    if key not in forms:
        forms[key] = _norm_form(module, weight, eps, dtype)
    form = forms[key]
    if form is None or not _is_norm(module, weight, eps, form, dtype):  # the module's own weight as well
        return None
    return partial(_rms_norm, form.scale(weight), eps)


def _norm_form(module: nn.Module, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> _NormForm | None:
    """Decide in fp32 what a norm's class computes, whatever its weights are, and where it rounds in its own dtype."""
    trials = [one.to(weight.device) for one in norm_weights(weight.numel())]
    fitting = [
        offset
        for offset in OFFSETS
        if all(_is_norm(module, one, eps, _NormForm(offset, False), torch.float32) for one in trials)
    ]
    if len(fitting) != 1:
        return None
    forms = [_NormForm(fitting[0], rounds_first) for rounds_first in ((False,) if fitting[0] else (True, False))]
    trials = [one.to(weight.dtype) for one in trials]
    same = {form: sum(_equal_elements(module, one, eps, form, dtype) for one in trials) for form in forms}
    best = max(forms, key=lambda form: same[form])
    return best if all(_is_norm(module, one, eps, best, dtype) for one in trials) else None


def _is_norm(module: nn.Module, weight: torch.Tensor, eps: float, form: _NormForm, dtype: torch.dtype) -> bool:
    """Say whether module and kernel, each in ``dtype`` and with this weight, give the formula's every element."""
    stock, scale = twin(module, weight=weight), form.scale(weight)
    exact_scale = weight.to("cpu").double() + form.offset
    for rows in trial_rows(weight.numel(), dtype):
        x, wide = rows.to(weight.device), rows.double()
        exact = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * exact_scale
        if not all(within_rounding(y, exact, dtype) for y in (stock(x), _normed(x, scale, eps))):
            return False
    return True


def _equal_elements(module: nn.Module, weight: torch.Tensor, eps: float, form: _NormForm, dtype: torch.dtype) -> int:
    stock, scale = twin(module, weight=weight), form.scale(weight)
    rows = [x.to(weight.device) for x in trial_rows(weight.numel(), dtype)]
    return sum(int((stock(x) == _normed(x, scale, eps)).sum()) for x in rows)


def _fused_gelu(module: nn.Module) -> Any:
    """GPT-2's GELU by its formula is torch's ``tanh`` approximation, which keeps its input alone."""
    if type(module).__name__ != "NewGELUActivation":
        return None
    return GELU_TANH[0] if _activation_of(module, torch.device("cpu")) is GELU_TANH else None


def _activation_of(module: Callable[..., Any], device: torch.device) -> Activation | None:
    """Return the one activation that a function is in fp32, element by element; None where none or several fit."""
    x = torch.linspace(-14, 14, 4001, dtype=torch.float32, device="cpu")
    x = torch.cat((x, x / 1000, 100 * x))
    got = module(x.to(device))
    if not torch.is_tensor(got):
        return None
    # 1 + tanh has lost digits where it is close to 0, which x multiplies
    fitting = [kind for kind in ACTIVATIONS if within_rounding(got, kind[0](x.double()), x.dtype, FP32 * x.abs())]
    return fitting[0] if len(fitting) == 1 else None


class _Affine(nn.Module):
    """Stands for a linear layer where the form of what is around it is decided: every element by itself."""

    def __init__(self, factor: float, shift: float) -> None:
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor + self.shift


def _fused_mlp(module: Any, dtype: torch.dtype) -> Any:
    """Return the fused forward of a gated MLP whose own forward is ``down(activation(gate(x)) * up(x))``, else None."""
    if {name for name, _ in module.named_children()} != GATED_MLP:
        return None
    device = next(module.parameters()).device
    kind = _activation_of(module.act_fn, device)
    if kind is None:
        return None
    parts: dict[str, nn.Module] = {
        "gate_proj": _Affine(1.25, 0.5),
        "up_proj": _Affine(-0.75, 2.0),
        "down_proj": _Affine(1.5, -1.0),
    }
    gate, up, down = parts.values()
    x = torch.linspace(-8, 8, 1024, dtype=torch.float32, device="cpu")
    x = torch.cat((x, 25 * x)).view(1, 2, -1)  # a clamp shows on large ones
    exact = down(kind[0](gate(x.double())) * up(x.double()))
    try:
        got = twin(module, parts)(x.to(device))
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:  # it does something else with its layers
        if is_out_of_memory(error):
            raise
        return None
    inner_error = FP32 * (1.0 + gate(x).abs() * up(x).abs())
    if not torch.is_tensor(got) or not within_rounding(got, exact, x.dtype, inner_error):
        return None
    g, u = (part(x).to(dtype) for part in (gate, up))
    exact = kind[0](g.double()) * u.double()
    if not within_rounding(kind[0](g.to(device)).mul_(u.to(device)), exact, dtype, inner_error):
        return None
    return partial(_gated_mlp, module, kind)
