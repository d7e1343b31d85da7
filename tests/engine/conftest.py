import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # the counter of live bytes

import pytest
import torch
from tiny_models import CPU, fill_adapter

from lowmem_rlhf.engine.base import SharedBase


@pytest.fixture(scope="session")
def load_tiny(tiny_folder):
    """Return a loader of the tiny local model as a SharedBase with a non-zero adapter."""

    def load(quantization="nf4", compute_dtype="bfloat16"):
        base = SharedBase.load(str(tiny_folder), CPU, quantization, compute_dtype, r=4, lora_alpha=8)
        fill_adapter(base)
        return base

    return load


@pytest.fixture(scope="session")
def smollm2_nf4(smollm2):
    base = SharedBase.load(smollm2, torch.device("cpu"), "nf4", "bfloat16")
    fill_adapter(base, size=0.02)
    return base
