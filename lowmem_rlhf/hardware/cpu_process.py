"""The process of a run on a CPU: what it takes beside live tensors, and what keeps that small. No torch here.

Two things grow while a run goes on, both measured with SmolLM2-135M. oneDNN compiles a kernel for every shape that it
multiplies, about half a MiB each, and keeps the last 1024 of them in two caches; packed rows are of a new length each
time. And glibc's heap, from which blocks of up to 32 MiB come, is torn into pieces by the small blocks that stay.
"""

import ctypes
import ctypes.util
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
PIECES = 0.25  # of live tensors: what the heap holds beside them, by `trim_heap`'s bound
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of torch's layer above it
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
        "allocator": round(PIECES * live),
    }


def bound_kernel_caches() -> None:
    """Let oneDNN keep no more compiled kernels than are used again, unless the user has set another number.

    Has to be called before the first product: both caches read their size once.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(KERNELS))


class Heap:
    """glibc's heap, given back when it has grown; elsewhere nothing happens.

    Giving back costs time, as the next step gets all of its pages anew (measured: 0.5 s for 1.5 GB), so it is only done
    when a step ends with more than `GROWTH` times what the first step after the last time ended with.
    """

    GROWTH = 1.25

    def __init__(self) -> None:
        self._least: int | None = None

    def keep_small(self) -> None:
        """Give free memory back to the system if the process has grown since the last time; at the end of a step."""
        now = resident_bytes()
        if now is None:
            return
        if self._least is None:
            self._least = now
        elif now > self.GROWTH * self._least:
            trim_heap()
            self._least = None


def trim_heap() -> None:
    """Give all free memory of glibc's heap back to the system."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none


def resident_bytes() -> int | None:
    """Return what the process shows now; None where the system does not say (it is Linux's)."""
    return _status("VmRSS")


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
