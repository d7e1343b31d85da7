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
from lowmem_rlhf.engine.sharded import ShardedLinear4bit
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.memory import is_out_of_memory
from lowmem_rlhf.recipe.lora_shape import ALL, LoraShape, scaling

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
        r, alpha = kwargs.get("r", config.r), kwargs.get("lora_alpha", config.lora_alpha)  # as its patterns say
        self.update_layer(adapter_name, r, lora_alpha=alpha, config=config)
        self.group = GroupedLoraLinear([self])

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:  # type: ignore[override]
        """Add an adapter, or one of another shape in its place."""
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[arg-type]
        self.scaling[adapter_name] = scaling(r, lora_alpha, config.use_rslora)

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

    plain = {kind.forward for kind in (nn.Linear, Linear4bit, Linear8bitLt, ShardedLinear4bit)}
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


def lora_config(shape: LoraShape, model_id: str, model: nn.Module) -> LoraConfig:
    """Return peft's configuration of a role's adapter: starts at zero, no dropout, our layer for every linear one.

    Modules that are linear layers by their class and compute something else (Llama 4's router) are left out.

    Raises:
        UserError: a regular expression fits something else than linear layers.
    """
    values = shape.values
    bypassed = [name for name, module in model.named_modules() if only_looks_linear(module)]
    if shape.target_modules == ALL:
        config: Any = model.config
        bypassed += family_of(config.model_type).bypassed
        names = names_beside_experts(model)
        if names is None and shape.layers_to_transform:  # of which peft wants names
            names = _linear_names(model)
        if names:
            values["target_modules"] = [name for name in names if name not in family_of(config.model_type).bypassed]
    elif shape.is_regex:
        _check_regex(shape, model_id, model)
    lora = LoraConfig(
        **values,
        exclude_modules=bypassed or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model_id,
    )
    lora._register_custom_module({nn.Linear: SharedLoraLinear, Conv1D: SharedLoraLinear})
    return lora


def _linear_names(model: Any) -> list[str]:
    """Return the last names of a model's linear layers but its head, as peft's ``all-linear`` finds them."""
    head = model.get_output_embeddings()
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _takes_one(module, head)})


def _takes_one(module: nn.Module, head: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | Conv1D | SharedLoraLinear) and module is not head


def _check_regex(shape: LoraShape, model_id: str, model: Any) -> None:
    """Check that a regular expression fits names of linear layers alone: peft would end at others."""
    head = model.get_output_embeddings()
    modules = [(name, m) for name, m in model.named_modules() if ".lora_" not in name and ".base_layer" not in name]
    taken = {name: module for name, module in modules if shape.takes(name)}
    if other := next(((name, module) for name, module in taken.items() if not _takes_one(module, head)), None):
        linear = next((name for name, module in modules if _takes_one(module, head) and name.startswith(other[0])), "")
        such = f", such as those of {linear}" if linear else ""
        raise UserError(
            f"lora.target_modules: the regular expression {shape.target_modules!r} fits {other[0]} of {model_id!r} "
            f"too, a {type(other[1]).__name__}; adapters lie beside linear layers inside the model: let it end in "
            f"their names{such}"
        )
