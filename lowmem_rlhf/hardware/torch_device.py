"""A device as torch tells of it: AMD's, Intel's, Apple's, and NVIDIA's where NVML is not there."""

import re
import sys
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import backend_of, never_run
from lowmem_rlhf.hardware.cpu_device import ram
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.suggest import did_you_mean


def torch_has(kind: str) -> bool:
    """Say whether torch finds a device of a kind."""
    import torch

    module = getattr(torch, kind, None)
    return module is not None and module.is_available()


def from_torch(kind: str, index: int | None, notes: tuple[str, ...] = ()) -> Device:
    """Build a Device from what ``torch.<kind>`` says of itself."""
    import torch

    asked = kind if index is None else f"{kind}:{index}"
    why = "".join(f"; {note}" for note in notes)
    try:
        module = torch.get_device_module(kind)
    except RuntimeError:
        raise UserError(
            f"device {asked!r} is not known to torch {torch.__version__}; use auto, cpu or cuda"
            f"{did_you_mean(kind, ('auto', 'cpu', 'cuda', 'xpu', 'mps'))}"
        ) from None
    if not getattr(module, "is_available", lambda: True)():
        raise UserError(f"device {asked!r} was asked for, but torch {torch.__version__} finds none; use cpu{why}")
    count = module.device_count() if hasattr(module, "device_count") else 1
    number = index or 0
    if number >= count:
        raise UserError(f"device {asked!r} does not exist: torch finds {count} of this kind; use {kind}:0 or `auto`")
    told = torch_memory(module, number)
    if told is None:
        raise UserError(f"device {kind!r} does not tell its memory (torch.{kind} has no mem_get_info); use cpu or cuda")
    backend = backend_of(kind)
    capability = tuple(module.get_device_capability(number)) if backend == "cuda" else None
    return Device(
        torch_device=kind if kind == "mps" else f"{kind}:{number}",
        name=_torch_name(kind, module, number, asked),
        total_bytes=told[0],
        free_bytes=told[1],
        compute_capability=capability,
        bf16=capability >= (8, 0) if capability else _computes_bf16(backend, module, number),
        source="torch",
        notes=(*notes, *filter(None, [never_run(backend)])),
        backend=backend,
    )


def _torch_name(kind: str, module: Any, number: int, asked: str) -> str:
    if hasattr(module, "get_device_name"):
        return str(module.get_device_name(number))
    module = getattr(sys.modules["torch"].backends, kind, None)
    return str(module.get_name()) if hasattr(module, "get_name") else asked


def _computes_bf16(backend: str, module: Any, number: int) -> bool:
    """Say whether a device that is not NVIDIA's multiplies bfloat16; what emulates it does not.

    AMD's chips have such instructions since CDNA 1 (gfx908) and RDNA 3 (gfx11); torch on MPS has the dtype since
    macOS 14. Of a backend that others have added it is taken to.
    """
    if backend == "rocm":
        chip = str(getattr(module.get_device_properties(number), "gcnArchName", ""))
        return re.match(r"gfx(908|90a|94|95|11|12)", chip) is not None
    if backend == "xpu":
        return bool(getattr(module.get_device_properties(number), "has_bfloat16_conversions", False))
    if backend == "mps":
        return bool(sys.modules["torch"].backends.mps.is_macos_or_newer(14, 0))
    return True


def torch_memory(module: Any, number: int) -> tuple[int, int] | None:
    """Return total and free bytes of a device as its torch module tells them; None where it tells neither.

    A driver of Intel that does not tell what is free (of graphics in a processor) is asked for the total alone.
    """
    if hasattr(module, "mem_get_info"):
        try:
            free_bytes, total_bytes = module.mem_get_info(number)
        except RuntimeError:
            total_bytes = module.get_device_properties(number).total_memory
            free_bytes = min(total_bytes - module.memory_allocated(number), ram()[1])
        return int(total_bytes), int(free_bytes)
    if hasattr(module, "recommended_max_memory"):  # Apple's, whose memory is the system's
        limit = int(module.recommended_max_memory())
        return limit, max(0, min(limit - int(module.driver_allocated_memory()), ram()[1]))
    return None
