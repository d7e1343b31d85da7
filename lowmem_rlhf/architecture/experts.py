"""Which parameters of a model are experts, and which of its linear layers take adapters beside them.

transformers keeps the experts of a layer stacked in parameters of three dimensions (experts, outputs, inputs). They
stay frozen: adapters lie beside attention and other layers that all tokens share, but not those that are called as
experts are, whose names peft maps to the stacks.
"""

import inspect
from typing import Any

# last names that peft maps to stacked experts, wherever they stand, and those of routers
EXPERTS, ROUTERS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}, ("gate", "router")


def expert_stacks(model: Any) -> list[tuple[Any, str]]:
    """Return the modules with stacked experts, and the names of these parameters in them.

    Only what a module of experts reads one by one counts: Llama 4 multiplies with the whole stack.
    """
    found = []
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if not type(module).__name__.endswith("Experts") or code is None or "bmm" in code.co_names:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            whole = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
            stacked = len(whole) == 3 and whole[0] > 1 and min(whole[1:]) > 1
            if stacked and name in code.co_names:
                found.append((module, name))
    return found


def names_beside_experts(model: Any) -> list[str] | None:
    """Return the last names of the linear layers that ``all-linear`` adapts; None where a model has no experts.

    The model may have adapters already.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if not expert_stacks(model):
        return None
    head = model.get_output_embeddings()
    names = {
        name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not set(name.split(".")) & {*ROUTERS}
        and "router" not in name
        and ".lora_" not in name
    }
    return sorted(names - EXPERTS)
