"""The adapter layer: peft's LoRA format and parameters, our own forward.

peft computes A and B in fp32 and casts every activation up and back. Here the masters stay fp32 and a 16-bit copy of
them, made once per optimizer step, is multiplied in the base's dtype and added in place to the base's output:
``y = base(x) + scaling * (x A^T) B^T`` (LoRA, arXiv 2106.09685). Which adapters take part is not a property of the
layer but of the role that the SharedBase is in, so entering a role touches no module.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass
class ActiveAdapters:
    """Shared by all adapter layers of one base: the adapters of the current role, and a version of their weights."""

    names: tuple[str, ...] = ()
    version: int = 0  # raised whenever weights change, so that the 16-bit copies are made anew


class _AddLora(torch.autograd.Function):
    """``y += scaling * (x A^T) B^T`` in place; gradients of the fp32 masters come from 16-bit products."""

    @staticmethod
    def forward(ctx, y, x, a, b, a16, b16, scaling):  # type: ignore[no-untyped-def]
        xa = x @ a16.t()  # (T, r), for x (T, in) and y (T, out)
        y.addmm_(xa, b16.t(), alpha=scaling)
        ctx.save_for_backward(x, xa, a16, b16)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        x, xa, a16, b16 = ctx.saved_tensors
        gxa = (grad_y @ b16).mul_(ctx.scaling)  # (T, r)
        grad_x = gxa @ a16 if ctx.needs_input_grad[1] else None
        grad_a = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_a = (gxa.t() @ x).float()
        if ctx.needs_input_grad[3]:
            grad_b = (grad_y.t() @ xa).float().mul_(ctx.scaling)
        return grad_y, grad_x, grad_a, grad_b, None, None, None


class SharedLoraLinear(nn.Module, LoraLayer):
    """A frozen linear layer of any kind (16-bit, int8, NF4, GPT-2's Conv1D) with the adapters of all roles.

    Takes peft's place for ``nn.Linear`` and its subclasses, so that injection, state dicts and files are peft's.
    """

    active: ActiveAdapters  # set by SharedBase after injection
    dense: torch.Tensor | None = None  # a 16-bit copy of quantized weights, (out, in), while the base lends one

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self._active_adapter = adapter_name
        self._copies: dict[str, tuple[tuple[Any, ...], torch.Tensor, torch.Tensor]] = {}
        self.update_layer(adapter_name, config.r, lora_alpha=config.lora_alpha, config=config)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output (..., out) in x's dtype, with the adapters of the current role added."""
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # (T, in): of more dimensions bitsandbytes returns a view, which must not change
        y = self.base_layer(x) if self.dense is None else F.linear(x, self.dense, self.base_layer.bias)  # type: ignore[arg-type]
        for name in self.active.names:
            a: torch.Tensor = self.lora_A[name].weight  # type: ignore[assignment]
            b: torch.Tensor = self.lora_B[name].weight  # type: ignore[assignment]
            a16, b16 = self._compute_copy(name, a, b, x.dtype)
            if torch.is_grad_enabled():
                y = _AddLora.apply(y, x, a, b, a16, b16, self.scaling[name])
            else:
                y.addmm_(x @ a16.t(), b16.t(), alpha=self.scaling[name])
        return y.view(*shape[:-1], -1)

    def _compute_copy(
        self, name: str, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = (self.active.version, a._version, b._version, dtype, a.device)
        cached = self._copies.get(name)
        if cached is None or cached[0] != key:
            cached = self._copies[name] = (key, a.detach().to(dtype), b.detach().to(dtype))
        return cached[1], cached[2]


def dequantized(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the 16-bit numbers (out, in) that an NF4 layer's weights stand for; None for any other layer."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is None:
        return None
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).to(dtype)  # type: ignore[arg-type]


def lora_config(r: int, lora_alpha: float, target_modules: str | list[str], model_id: str) -> LoraConfig:
    """Return peft's configuration of a role's adapter: starts at zero, no dropout, our layer for every linear one."""
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]
        target_modules=target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model_id,
    )
    config._register_custom_module({nn.Linear: SharedLoraLinear, Conv1D: SharedLoraLinear})
    return config
