"""The process of a run on a CPU: what it takes beside live tensors, and what keeps that small. No torch here.

oneDNN compiles a kernel for every shape that it multiplies, about half a MiB each, and keeps the last 1024 of them in
two caches. Packed rows have another length each time, so the process would grow by 50 MiB a step (SmolLM2-135M). What
glibc's heap holds beside live blocks, scratch memory of kernels and pieces that nothing fits into, levels off.
"""

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

MIB = 1024**2

KERNELS = 256  # a pass has about 50 shapes, a step with rollouts 120: as few are compiled again as with 1024
KERNEL_BYTES = 560 * 1024  # of one, measured
LIBRARIES_BYTES = 600 * MIB  # Python, torch, transformers, peft, datasets, a tokenizer and a run's data; measured
HEAP = 0.4  # of live tensors: what the heap holds beside them after 40 steps of SFT; measured
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of torch's layer above it
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_STATUS, _CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def process_bytes(live: int) -> dict[str, int]:
    """Return what a process on a CPU shows at its peak, by component.

    Args:
        live: bytes of live tensors, as the memory model predicts them.
    """
    return {
        "live_tensors": live,
        "libraries": LIBRARIES_BYTES,
        "kernels": KERNELS * KERNEL_BYTES,
        "allocator": round(HEAP * live),
    }


def bound_kernel_caches() -> None:
    """Let oneDNN keep no more compiled kernels than are used again, unless the user has set another number.

    Has to be called before the first product: both caches read their size once.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(KERNELS))


def let_waiting_threads_sleep() -> None:
    """Let OpenMP's threads sleep between two parallel regions, unless the user has said how they wait.

    They spin by default, and where other programs use the cores, a thread that spins keeps the one that it waits for
    from running. Has to be called before torch is imported: the OpenMP library reads its settings when it is loaded.
    ``OMP_WAIT_POLICY`` is OpenMP's own and holds for GCC's library (torch's builds for Linux), LLVM's and Intel's;
    these have older names for the same, and who has set one of them has chosen too.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def trim_heap() -> None:
    """Give all free memory of glibc's heap back to the system; with another C library, nothing happens."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none


def reset_peak() -> None:
    """Begin a new peak of the process, where the system lets it (Linux)."""
    if os.access(_CLEAR_PEAK, os.W_OK):
        _CLEAR_PEAK.write_text("5")


def peak_bytes() -> int | None:
    """Return the most that the process showed since `reset_peak`; None where it cannot be reset."""
    return _status("VmHWM") if os.access(_CLEAR_PEAK, os.W_OK) else None


def _status(name: str) -> int | None:
    with suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
