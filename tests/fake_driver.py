"""A stand-in for the NVIDIA driver's library (hardware/fake_nvml.c), compiled for the tests that need one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent / "hardware" / "fake_nvml.c"


def compile_driver(folder: Path) -> Path:
    """Compile it into a folder and return that; the test is skipped where it cannot be."""
    if not sys.platform.startswith("linux") or not shutil.which("gcc"):
        pytest.skip("the stand-in for NVML needs Linux and gcc")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)], check=True)
    return folder
