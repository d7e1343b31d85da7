"""What this machine does at best: FLOPs a second in matrix products, bytes a second from memory. Both are measured."""

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from lowmem_rlhf.hardware.memory import clock

SECONDS = 0.15  # spent on each product, at least
BUFFER_BYTES = 2**28  # larger than any cache


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of ``work``, run again and again for `SECONDS` and at least three times."""
    work()
    best, runs, end = math.inf, 0, time.perf_counter() + SECONDS
    while runs < 3 or time.perf_counter() < end:
        start = clock(device)
        work()
        best, runs = min(best, clock(device) - start), runs + 1
    return best


@torch.no_grad()
def matmul_rate(shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return FLOP/s of linear layers on ``rows`` tokens: the FLOPs of all of them over the sum of their best times.

    Args:
        shapes: (inputs, outputs) of each layer; equal ones are measured once.
    """
    flops, total = 0, 0.0
    for shape in set(shapes):
        inputs, outputs = shape
        x = torch.randn(rows, inputs, dtype=dtype, device=device)
        weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
        count = list(shapes).count(shape)
        flops += count * 2 * rows * inputs * outputs
        total += count * best_seconds(lambda x=x, weight=weight: F.linear(x, weight), device)  # type: ignore[misc]
    return flops / total


@torch.no_grad()
def bandwidth(device: torch.device) -> float:
    """Return bytes/s of memory: the better of reading a buffer and of copying it (which reads and writes)."""
    size = BUFFER_BYTES
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    reading = size / best_seconds(source.sum, device)
    copying = 2 * size / best_seconds(lambda: target.copy_(source), device)
    return max(reading, copying)
