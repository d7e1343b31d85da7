"""Peak memory of the device, and the ladder that a step climbs down when memory runs out."""

import gc
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.hardware import cpu_process
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.torch_device import torch_memory

T = TypeVar("T")
_SIGNS = (  # of memory that ran out, in errors of CUDA's and AMD's BLAS, Intel's driver, bitsandbytes and CPUs
    *("out of memory", "can't allocate memory", "OUT_OF_DEVICE_MEMORY"),
    *("BLAS_STATUS_ALLOC_FAILED", "BLAS_STATUS_NOT_INITIALIZED"),
)


def reset_peak(device: torch.device) -> None:
    """Start measuring a new peak: on a device that counts, of what is allocated; on the CPU, of the process."""
    if capabilities(device).on_cpu:
        cpu_process.reset_peak()
    elif reset := device_counter(device, "reset_peak_memory_stats"):
        reset(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak since `reset_peak`: of allocated bytes where the device counts, else of what the process shows.

    Where the system cannot tell a process's peak, it is what the process shows now.
    """
    if count := device_counter(device, "max_memory_allocated"):
        return int(count(device))
    peak = cpu_process.peak_bytes() if capabilities(device).on_cpu else None
    return peak or int(psutil.Process().memory_info().rss)


def release(device: torch.device) -> None:
    """Give back what is no longer used, so that other programs and the next model find it."""
    gc.collect()
    if capabilities(device).on_cpu:
        cpu_process.trim_heap()
    if empty := device_counter(device, "empty_cache"):
        empty()


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free now: of the device where it can be asked, otherwise of the machine."""
    if not capabilities(device).on_cpu:
        told = torch_memory(torch.get_device_module(device), device.index or 0)
        if told is not None:
            return told[1]
    return int(psutil.virtual_memory().available)


def clock(device: torch.device) -> float:
    """Return seconds, once the device has done what it was given."""
    if wait := device_counter(device, "synchronize"):
        wait(device) if device.index else wait()  # not every kind of device takes an argument
    return time.perf_counter()


def device_counter(device: torch.device, name: str) -> Callable[..., Any] | None:
    """Return a function of the device's module (``max_memory_allocated``, ...); None on a CPU and where it has none."""
    return None if capabilities(device).on_cpu else getattr(torch.get_device_module(device), name, None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; BLAS, bitsandbytes, Intel's driver and CPUs have no type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def device_failure(error: BaseException, phase: str, step: int) -> str | None:
    """Return what to say of an error after which the device answers nothing; None: it is another one."""
    kind = getattr(torch, "AcceleratorError", None)  # torch 2.8 and newer
    if kind is None or not isinstance(error, kind):
        return None
    said = " ".join(str(error).split(chr(10))[0].split())
    return (
        f"the device failed in the {phase} phase of step {step} ({said}); nothing runs on it until the process has "
        "ended: look at its driver's log and its temperature, and go on with --resume"
    )


def retried(
    work: Callable[[], T], smaller: Callable[[], str], device: torch.device, say: Callable[[str], None] | None = None
) -> T:
    """Run ``work()``; when the device's memory runs out, make it smaller and run it again.

    Args:
        work: must leave nothing behind when it fails.
        smaller: makes the work smaller and returns what was done; an empty text where nothing is left to do. The work
            is then run once more as it is, since another program may have taken the memory for a moment only.
        say: is given what was done.

    Raises:
        RuntimeError: the last out-of-memory error, without the frames that hold the tensors of the failed try.
    """
    last = False
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = _without_frames(error)
        release(device)  # not before: until here the error's frames held what the failed try had made
        if sentence := smaller():
            last = False
            if say:
                say(sentence)
        elif last:
            raise failure
        else:
            last = True


def _without_frames(error: BaseException) -> BaseException:
    """Return an error that no longer holds the locals of the calls that it came through, nor do those behind it."""
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
    return error


def retry_with_smaller(
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
        least: the smallest size worth trying; it is tried twice.
        key: the recipe's key that pins the size, for messages.

    Returns:
        The result, and the size that fitted.

    Raises:
        RunError: not even the least size fits.
    """

    def smaller() -> str:
        nonlocal size
        if size <= least:
            return ""
        before, size = size, max(least, size // 2)
        return f"the device's memory ran out with {key}={before}; going on with {size}"

    try:
        return retried(lambda: work(size), smaller, device, say), size
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"the device's memory ran out even with {key}={size}; shorten generation.max_completion_length, "
            "take a smaller model or hardware.quantization=nf4"
        ) from error
