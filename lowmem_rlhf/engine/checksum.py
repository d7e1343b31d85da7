"""A checksum of the frozen base: equal before and after a run, or what the roles were compared with has drifted."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from lowmem_rlhf.engine.roles import is_following
from lowmem_rlhf.engine.sharded import local_part

BLOCK = 1 << 20  # values that are added up to one number; places within a block do not tell
AT_ONCE = 16  # blocks: on a CPU the sum makes a copy of them as 64-bit integers

DRIFTED = (
    "the frozen base is not the one that the run began with: its weights changed while it ran, so that neither the "
    "reference nor the adapter means what it did, and nothing of this run should be used. Look for what writes into "
    "the model's weights (a reward function or other code in this process, or faulty memory), and run it again"
)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def base_checksum(base: nn.Module) -> str:
    """Return the SHA-256 of exact integer sums over the bits of all frozen tensors, codes of quantized ones included.

    The sums are taken where a tensor lies, each of `BLOCK` values, so that a device's order of adding changes nothing
    and few numbers come to the host. What trains is left out, and a reference that follows it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_frozen(base), key=lambda item: item[0]):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(",".join(map(str, _sums(tensor))).encode())
    return digest.hexdigest()


def _sums(tensor: torch.Tensor) -> list[int]:
    values = local_part(tensor.detach()).contiguous().view(-1)
    values = values.view(torch.uint8 if values.dtype == torch.bool else _INTEGERS[values.element_size()])
    whole = len(values) // BLOCK * BLOCK
    parts = [part.view(-1, BLOCK).sum(1, dtype=torch.int64) for part in values[:whole].split(AT_ONCE * BLOCK)]
    rest = values[whole:].sum(dtype=torch.int64)[None]
    sums: list[int] = torch.cat([*parts, rest]).tolist()
    return sums


def _frozen(base: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every frozen tensor by name: parameters, buffers, and what quantized weights are scaled by."""
    for name, parameter in base.named_parameters():
        if not parameter.requires_grad and not is_following(name):
            yield name, parameter
            yield from _scales(f"{name}.quant_state", getattr(parameter, "quant_state", None))
    yield from base.named_buffers()
    for name, module in base.named_modules():  # of int8, on the weight until the layer's first call, then beside it
        for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
            if torch.is_tensor(scale := getattr(holder, "SCB", None)):
                yield f"{name}.SCB", scale


def _scales(name: str, state: object) -> Iterator[tuple[str, torch.Tensor]]:
    for key in ("absmax", "code", "offset"):
        if torch.is_tensor(value := getattr(state, key, None)):
            yield f"{name}.{key}", value
    if (nested := getattr(state, "state2", None)) is not None:
        yield from _scales(f"{name}.state2", nested)
