"""The adapter layer: peft's LoRA format and parameters, our own forward.

peft computes A and B in fp32 and casts every activation up and back. Here the masters stay fp32 and a 16-bit copy of
them, made once per optimizer step, is multiplied in the base's dtype (see `grouped_lora`). Which adapters take part is
not a property of the layer but of the role that the SharedBase is in, so entering a role touches no module.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowmem_rlhf.architecture.experts import names_beside_experts
from lowmem_rlhf.architecture.families import family_of
from lowmem_rlhf.engine.grouped_lora import GroupedLoraLinear
from lowmem_rlhf.hardware.memory import is_out_of_memory

LINEAR = 0.02  # of the largest result: rounding moves a product by less


@dataclass
class ActiveAdapters:
    """Shared by all adapter layers of one base: the adapters of the current role, and a version of their weights."""

    names: tuple[str, ...] = ()
    version: int = 0  # raised whenever weights change, so that the 16-bit copies are made anew
    calls: list[tuple["SharedLoraLinear", torch.Tensor]] | None = None  # filled while calls are recorded


class SharedLoraLinear(nn.Module, LoraLayer):
    """A frozen linear layer of any kind (16-bit, int8, NF4, GPT-2's Conv1D) with the adapters of all roles.

    Takes peft's place for ``nn.Linear`` and its subclasses, so that injection, state dicts and files are peft's.
    """

    active: ActiveAdapters  # set by SharedBase after injection

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r, lora_alpha=config.lora_alpha, config=config)  # type: ignore[arg-type]
        self.group = GroupedLoraLinear([self])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output (..., out) in x's dtype, with the adapters of the current role added."""
        if self.active.calls is not None:
            self.active.calls.append((self, x))
        return self.group.output(self, x)

    def masters(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an adapter's fp32 A (r, in) and B (out, r)."""
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]


@torch.no_grad()
def only_looks_linear(module: nn.Module) -> bool:
    """Say whether a module is derived from a linear layer and its forward, which is one of its own, is no product."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    plain = {kind.forward for kind in (nn.Linear, Linear4bit, Linear8bitLt)}
    if not isinstance(module, nn.Linear) or type(module).forward in plain or module.weight.is_meta:
        return False
    weight = module.weight
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
    try:
        got = module(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # it takes other inputs
        if is_out_of_memory(error):
            raise
        return True
    want = F.linear(x, weight, module.bias)
    return not torch.is_tensor(got) or not torch.allclose(got, want, rtol=0, atol=LINEAR * float(want.abs().max()))


def lora_config(
    r: int,
    lora_alpha: float,
    target_modules: str | list[str],
    model_id: str,
    model: nn.Module,
    use_rslora: bool = False,
) -> LoraConfig:
    """Return peft's configuration of a role's adapter: starts at zero, no dropout, our layer for every linear one.

    Modules that are linear layers by their class and compute something else (Llama 4's router) are left out.
    """
    bypassed = [name for name, module in model.named_modules() if only_looks_linear(module)]
    if target_modules == "all-linear":
        config: Any = model.config
        bypassed += family_of(config.model_type).bypassed
        if names := names_beside_experts(model):
            target_modules = [name for name in names if name not in family_of(config.model_type).bypassed]
    lora = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]
        use_rslora=use_rslora,
        target_modules=target_modules,
        exclude_modules=bypassed or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model_id,
    )
    lora._register_custom_module({nn.Linear: SharedLoraLinear, Conv1D: SharedLoraLinear})
    return lora
