"""The CPU as a device: its cores, its instructions, and the RAM that is its memory. No torch here."""

import os
import platform
import re
import shutil
from pathlib import Path

import psutil

from lowmem_rlhf.hardware.device import Device


def cpu_device(notes: tuple[str, ...] = ()) -> Device:
    """Return the CPU with its RAM as the memory."""
    total_bytes, free_bytes = ram()
    about = _cpu_info()
    match = re.search(r"^model name\s*:\s*(.+)$", about, re.MULTILINE)
    name = match[1].strip() if match else platform.processor() or platform.machine() or "CPU"
    flags = re.search(r"^flags\s*:(.*)", about, re.MULTILINE)  # of x86; other processors name theirs otherwise
    known = flags[1].split() if flags else []
    has = "avx512_bf16" in known
    compiler = _compiler() if has else None
    return Device(
        torch_device="cpu",
        name=name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        compute_capability=None,
        bf16=True,
        source="cpu",
        notes=notes,
        avx512_bf16=has,
        compiler=compiler,
        slow_half=bool(known) and "avx512f" not in known,
        cores=_cores(),
    )


def _cores() -> int:
    """Return how many cores this process may use; two threads of one core count once."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def _compiler() -> str | None:
    """Return the C compiler's path; None where `engine.decode.native` does not run or is switched off."""
    if platform.system() != "Linux" or os.environ.get("LOWMEM_RLHF_NATIVE") == "0":
        return None
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def _cpu_info() -> str:
    """Return what Linux tells of the processor; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""


def ram(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Return total and available RAM in bytes, or the container's limit and what is left of it where that is less."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for folder, limit, used in (
        (cgroup, "memory.max", "memory.current"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            cap, held = int((folder / limit).read_text()), int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no such control group, or no limit ("max")
        cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))  # given back on demand
        if cap < total:
            return cap, max(0, min(available, cap - max(0, held - cache)))
    return total, available
