"""What processes exchange of the parameters that train, over what the device has for it (NCCL on CUDA)."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from lowmem_rlhf.processes.world import World

BUCKET = 32 * 2**20  # bytes that are sent at once


def sum_gradients(world: World, parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of these parameters over all processes, in place; those without one have it nowhere.

    Raises:
        PeerLostError: a process has ended or does not answer.
    """
    if not world.several:
        return
    with world.reached():
        for bucket in _buckets([one.grad for one in parameters if one.grad is not None]):
            flat = torch.cat([one.flatten() for one in bucket])
            dist.all_reduce(flat)
            _put_back(flat, bucket)


def same_parameters(world: World, parameters: Sequence[nn.Parameter]) -> None:
    """Take over the first process's parameters where the cards are not alike, since other kernels may round otherwise.

    Raises:
        PeerLostError: as `sum_gradients`.
    """
    if world.alike:
        return
    with world.reached():
        for bucket in _buckets([one.data for one in parameters]):
            flat = torch.cat([one.flatten() for one in bucket])
            dist.broadcast(flat, 0)
            _put_back(flat, bucket)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors in lists of one dtype and at most `BUCKET` bytes, or of one tensor."""
    bucket: list[torch.Tensor] = []
    size = 0
    for one in tensors:
        if bucket and (size + one.nbytes > BUCKET or one.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(one)
        size += one.nbytes
    if bucket:
        yield bucket


def _put_back(flat: torch.Tensor, into: Sequence[torch.Tensor]) -> None:
    for part, one in zip(flat.split([one.numel() for one in into]), into, strict=True):
        one.copy_(part.view_as(one))
