"""What trials are made of: weights and inputs as real models have them, and bounds that rounding explains.

A trial says yes only to what is right for any weights. Random numbers near their initial values hide a wrong form (a
norm that multiplies with ``w`` for ``1 + w``), and one number for a whole tensor hides a wrong element behind a large
one, so weights come from several distributions and every element is looked at.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

ROUNDING_SHARE = 1 / 12  # moved to the next number, these are as far off as rounding moves all: 0.29 eps, mean square
# A full nudge moves by about four times a rounding's mean error, and a layer has about ten roundings one after another.
ROW_NOISE, ELEMENT_NOISE = 3.0, 6.0
ROUNDINGS = 2  # that a kernel and its formula may be apart: one of an inner result, one of the last


def norm_weights(width: int) -> Iterator[torch.Tensor]:
    """Yield weights (width,) of a norm, fp32 on the CPU: near 1, large, small of either sign with zeros and outliers.

    Gemma-3-270m's, for example, go from -0.57 to 94 with a mean of 29 in one norm.
    """
    generator = torch.Generator(device="cpu").manual_seed(width)

    def normal() -> torch.Tensor:
        return torch.randn(width, generator=generator, dtype=torch.float32, device="cpu")

    yield 1 + 0.1 * normal()
    yield 29 + 12 * normal()
    mixed = 0.5 * normal()
    mixed[::5] = 0.0
    mixed[1::7] *= 60
    yield mixed
    yield -1 + 0.3 * normal()


def trial_rows(width: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield inputs (3, width) on the CPU: so small that an epsilon matters, and too large to be squared in float16."""
    generator = torch.Generator(device="cpu").manual_seed(width)
    for size in (1e-3, 1.0, 300.0):
        x = size * torch.randn((3, width), generator=generator, dtype=torch.float32, device="cpu")
        x[0, :: max(1, width // 3)] *= 30  # the massive activations of a text's first token
        yield x.to(dtype)


def within_rounding(
    got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, inner_error: torch.Tensor | float = 0.0
) -> bool:
    """Say whether every element of a result is as near to the exact one as rounding explains.

    Args:
        got: a result in ``dtype``, on any device.
        exact: what it should be, in a wider dtype on the CPU.
        inner_error: the rounding of inner results that stays in the result whatever its own size is.
    """
    if got.dtype != dtype or got.shape != exact.shape:
        return False
    limits, got = torch.finfo(dtype), got.detach().to("cpu")
    allowed = ROUNDINGS * limits.eps * exact.abs() + limits.smallest_normal
    allowed += 32 * torch.finfo(torch.float32).eps * exact.abs()  # of fp32 sums inside
    allowed += inner_error
    off = (got.to(exact.dtype) - exact).abs()
    overflown = (got == exact.to(dtype)) & got.isinf()  # both round to infinity
    return bool(((off <= allowed) | overflown).all())


def nudged(x: torch.Tensor, share: float = 1.0, dtype: torch.dtype | None = None, seed: int = 0) -> torch.Tensor:
    """Return a tensor with this share of its elements moved to a next number of a dtype (its own), up or down."""
    generator = torch.Generator(device="cpu").manual_seed(x.numel() + seed)
    drawn = torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu")
    signs = (drawn < share / 2).to(torch.int8) - (drawn > 1 - share / 2).to(torch.int8)
    step = torch.finfo(dtype or x.dtype).eps * signs.to(device=x.device, dtype=torch.float32)
    return (x.float() * (1 + step)).to(x.dtype)


@contextmanager
def nudged_layers(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> Iterator[None]:
    """Move what layers and products give by about one rounding: how far a model's results move is what that explains.

    Args:
        dtype: that it computes in; some add its layers up in fp32 (Mamba).
        seed: of the draw.
    """

    def nudge(module: nn.Module, args: Any, result: Any) -> Any:
        first = nudged(result[0] if isinstance(result, tuple) else result, ROUNDING_SHARE, dtype, seed)
        return (first, *result[1:]) if isinstance(result, tuple) else first

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer | LoraLayer)]
    handles = [layer.register_forward_hook(nudge) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_within_noise(got: torch.Tensor, want: torch.Tensor, moved: torch.Tensor, source: torch.Tensor) -> bool:
    """Say whether two results (.., H) are no further apart than rounding explains: every row, and every element of it.

    Args:
        moved: what the way that gave ``want`` gives for an input that was `nudged`: its distance is that of rounding.
        source: the same way's input (.., H), to which it adds: where both cancel, the rounding of the larger one stays.
    """
    eps = torch.finfo(want.dtype).eps
    got, want, moved, source = (x.detach().to("cpu", torch.float32).flatten(0, -2) for x in (got, want, moved, source))
    off, size = (got - want).abs(), eps * (want.abs() + source.abs())
    noise = (moved - want).square().mean(-1, keepdim=True)
    of_rows = off.square().mean(-1, keepdim=True) <= ROW_NOISE**2 * (noise + size.square().mean(-1, keepdim=True))
    return bool(of_rows.all() and (off <= ELEMENT_NOISE * noise.sqrt() + ROUNDINGS * size).all())


def twin(
    module: nn.Module, children: dict[str, nn.Module] | None = None, weight: torch.Tensor | None = None
) -> nn.Module:
    """Return a module of the same class and settings with its class's forward, and some children or its weight others.

    Nothing is copied: what is not replaced is the module's own.
    """
    other = copy.copy(module)
    other.__dict__.pop("forward", None)
    other._modules = {**module._modules, **(children or {})}
    if weight is not None:
        other._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return other


def simple_attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return the plain settings of a module, which decide with its class what it computes."""
    kinds = (bool, int, float, str, type(None))
    return tuple(sorted((k, repr(v)) for k, v in vars(module).items() if isinstance(v, kinds) and k != "layer_idx"))
