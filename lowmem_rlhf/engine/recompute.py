"""Gradient checkpointing: layers that keep only their input and compute the rest again in the backward pass.

The input may wait in host memory ("offload"). It is copied without rounding, so gradients are the same numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities

Waiting = torch.Tensor | tuple[torch.device, torch.Tensor]  # where a tensor came from, and its copy in host memory


def recompute_layers(model: PreTrainedModel, layers: bool | int, offload: bool) -> None:
    """Let the first ``layers`` decoder layers be recomputed (all, none, or a number); the others keep activations.

    The first ones, because the backward pass begins at the last: the layers that keep theirs have freed them before
    the first recomputed one needs room for its own. Layers below the first that trains have no backward pass: they keep
    nothing by themselves, so that nothing of them is computed again or waits in host memory.

    Args:
        offload: the recomputed layers' inputs wait in host memory; on a CPU they are there already.

    Raises:
        UserError: the model has fewer layers.
    """
    checkpointed = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    count = len(checkpointed) if layers is True else int(layers)
    if not 0 <= count <= len(checkpointed):
        raise UserError(
            f"hardware.gradient_checkpointing: got {count}, but the model has {len(checkpointed)} layers; give at most "
            f"{len(checkpointed)}, or true for all of them"
        )
    first = _first_that_trains(model, checkpointed)
    away = offload and not capabilities(model.device).on_cpu
    for index, layer in enumerate(checkpointed):
        layer.gradient_checkpointing = first <= index < count
        layer._gradient_checkpointing_func = _recomputed_from_host if away else _recomputed  # type: ignore[assignment]


def _first_that_trains(model: nn.Module, layers: Sequence[nn.Module]) -> int:
    """Return the first layer with something that trains; 0 where something outside of layers does, perhaps below."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    inside = [{id(p) for p in layer.parameters()} & trained for layer in layers]
    if trained.difference(*inside):
        return 0
    return next((index for index, those in enumerate(inside) if those), 0)


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call a layer whose activations, in a pass with gradients, are computed again in the backward pass."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def _recomputed_from_host(function: Callable[..., Any], *args: Any) -> Any:
    """As `_recomputed`; what the checkpoint itself saves, the layer's input, waits in host memory."""
    with saved_tensors_hooks(_to_host, _from_host):
        return _recomputed(function, *args)


def _to_host(x: torch.Tensor) -> Waiting:
    """Copy a tensor to host memory.

    Where the device has pinned copies nobody waits for it: the copy back and the next owner of the tensor's device
    memory stand in the same stream behind it, and torch hands pinned memory out anew only when its copies are done.
    """
    if capabilities(x.device).on_cpu:
        return x
    pinned = capabilities(x.device).pinned_copies
    host = torch.empty_like(x, device="cpu", pin_memory=pinned, requires_grad=False)
    return x.device, host.copy_(x.detach(), non_blocking=pinned)


def _from_host(waiting: Waiting) -> torch.Tensor:
    if isinstance(waiting, torch.Tensor):
        return waiting
    device, host = waiting
    return host.to(device, non_blocking=capabilities(device).pinned_copies)
