"""Peak memory of the device, and the ladder that a step climbs down when memory runs out."""

import gc
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from lowmem_rlhf.errors import RunError

T = TypeVar("T")


def reset_peak(device: torch.device) -> None:
    """Start measuring a new peak (on a device that counts; the CPU does not)."""
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int:
    """Return the device's peak of allocated bytes since `reset_peak`; on the CPU the process's resident bytes now."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss
    return int(torch.get_device_module(device).max_memory_allocated())


def with_less(
    work: Callable[[int], T],
    size: int,
    least: int,
    key: str,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[T, int]:
    """Run ``work(size)``; when the device's memory runs out, halve the size and try again.

    Args:
        work: must leave nothing behind when it fails.
        least: the smallest size worth trying.
        key: the recipe's key that pins the size, for messages.

    Returns:
        The result, and the size that fitted.

    Raises:
        RunError: not even the least size fits.
    """
    while True:
        try:
            return work(size), size
        except torch.OutOfMemoryError as error:
            if size <= least:
                raise RunError(
                    f"the device's memory ran out even with {key}={size}; shorten generation.max_completion_length, "
                    "take a smaller model or hardware.quantization=nf4"
                ) from error
        gc.collect()
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
        smaller = max(least, size // 2)
        say(f"the device's memory ran out with {key}={size}; going on with {smaller}")
        size = smaller
