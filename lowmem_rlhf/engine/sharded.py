"""A base that no card holds: the layers' weights are shared out among processes, by torch's FSDP2.

Each process keeps its part of every linear layer's weight (16-bit numbers or NF4 codes). Before a layer runs, forward
or backward, its weights are gathered, and let go of afterwards. Embeddings, norms, the scales of NF4 blocks, the output
head and the adapters are whole in each process.

Gathering takes all processes, which `lockstep` sees to.

The model is read into host memory first, so that no card ever holds more than its part and one layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.processes.world import begun


class ShardedLinear4bit(nn.Linear):
    """An NF4 layer of bitsandbytes whose codes are a parameter of their own, and whose scales lie beside it.

    bitsandbytes keeps the scales on the weight, and FSDP2 puts another tensor into the weight's place
    (bitsandbytes issue 1945, accelerate issue 3983).
    """

    def __init__(self, layer: Any, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.codes = nn.Parameter(layer.weight.data.detach().view(torch.uint8), requires_grad=False)
        self.bias = layer.bias
        self.quant_state = layer.weight.quant_state
        self.quant_state.to(device)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The codes, whole inside the layer's passes, with their scales as bitsandbytes has them."""
        codes: Any = self.codes.detach()
        codes.quant_state = self.quant_state
        return codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (..., out) for x (..., in), in x's dtype."""
        from bitsandbytes import matmul_4bit

        bias = None if self.bias is None else self.bias.to(x.dtype)
        result: torch.Tensor = matmul_4bit(x, self.codes.detach().t(), bias=bias, quant_state=self.quant_state)
        return result


def shard_layers(model: PreTrainedModel, decoder: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Share out the linear layers inside the layers of a model that lies in host memory, and move the rest to a device.

    Args:
        model: frozen, as `load_base` gives it.
        decoder: the part of it that has the layers.
        device: that computes.
        offload: the parts lie in host memory, too.

    Raises:
        UserError: the model has no layers of the kind.
    """
    layers = [one for one in decoder.modules() if isinstance(one, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"hardware.shard_base: {type(model).__name__} does not mark its layers (as transformers' "
            "GradientCheckpointingLayer), so they cannot be shared out; leave it out"
        )
    mesh = init_device_mesh(device.type, (begun().size,))
    pinned = capabilities(device).pinned_copies
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    for layer in layers:
        _separate_codes(layer, device)
        shared = set(_weights(layer))
        others = {one for one in layer.parameters() if one not in shared}
        _move({*others, *layer.buffers()}, device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=others, offload_policy=policy)
    _move({one for one in (*model.parameters(), *model.buffers()) if not isinstance(one, DTensor)}, device)
    # the layers of one root share streams, so that the next one's weights come while this one computes
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()), offload_policy=policy)


def _weights(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what is shared out of a layer: the weights of its linear layers."""
    for module in layer.modules():
        if isinstance(module, ShardedLinear4bit):
            yield module.codes
        elif isinstance(module, nn.Linear | Conv1D):
            yield module.weight  # type: ignore[misc]


def _separate_codes(layer: nn.Module, device: torch.device) -> None:
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if getattr(getattr(child, "weight", None), "quant_state", None) is not None:
                setattr(module, name, ShardedLinear4bit(child, device))


def _move(tensors: set[torch.Tensor], device: torch.device) -> None:
    for one in tensors:
        one.data = one.data.to(device)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor: all of it, if it is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
