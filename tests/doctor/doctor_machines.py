"""A machine in good order, and answers of other ones. Not a test module."""

from pathlib import Path

from lowmem_rlhf.doctor.machine import Disk, Hub
from lowmem_rlhf.hardware.device import Device

GIB = 1024**3
CPU = Device("cpu", "a processor", 32 * GIB, 24 * GIB, None, True, source="cpu")
CPU_TORCH = {
    "error": None,
    "version": "2.13.0+cpu",
    "cuda": None,
    "hip": None,
    "xpu": None,
    "architectures": [],
    "cards": [],
    "unreachable": None,
}
CUDA_TORCH = {
    **CPU_TORCH,
    "version": "2.13.0+cu130",
    "cuda": "13.0",
    "architectures": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}
RIGHT = {
    "version": "0.50.2",
    "error": None,
    "library_error": None,
    "rounding": {"1": 0.002, "16": 0.002, "128": 0.002},
    "quantization": 0.09,
}
USUAL = {
    "device": CPU,
    "device_problem": "",
    "inventory": None,
    "driver_problem": "",
    "makers": (),
    "torch": CPU_TORCH,
    "four_bit": RIGHT,
    "python": (3, 12, 1),
    "system": "Linux",
    "distribution": "ubuntu",
    "is_wsl": False,
    "in_container": False,
    "environment": {},
    "shared_memory": 16 * GIB,
    "ram_bytes": 32 * GIB,
    "hub": Hub("huggingface.co", code=200),
    "has_token": False,
    "cached_models": 2,
    "disks": (Disk("the cache of models", Path("cache"), 100 * GIB), Disk("runs", Path("runs"), 100 * GIB)),
}
