"""Peak memory and running out of it, as devices of several kinds tell it."""

from types import SimpleNamespace

import pytest
import torch

from lowmem_rlhf.hardware import memory


@pytest.fixture
def device_module(monkeypatch):
    """Stand in for torch.cuda on a machine with two cards; records which device each call names."""
    asked = []
    module = SimpleNamespace(
        reset_peak_memory_stats=lambda device: asked.append(("reset", device)),
        max_memory_allocated=lambda device: asked.append(("peak", device)) or 123,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return SimpleNamespace(asked=asked, module=module)


def test_the_peak_is_that_of_the_device_that_computes(device_module):
    second = torch.device("cuda:1")
    memory.reset_peak(second)
    assert memory.peak_bytes(second) == 123
    assert device_module.asked == [("reset", second), ("peak", second)]


def test_a_device_that_counts_nothing_reports_the_process(device_module):
    del device_module.module.reset_peak_memory_stats, device_module.module.max_memory_allocated
    memory.reset_peak(torch.device("mps"))
    assert memory.peak_bytes(torch.device("mps")) > 10**6
    assert memory.clock(torch.device("mps")) <= memory.clock(torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Error: out of memory at line 1 in file ops.cu"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, out):
    assert memory.is_out_of_memory(error) is out


def test_the_clock_waits_for_the_device_that_computes(device_module):
    device_module.module.synchronize = lambda *device: device_module.asked.append(device)
    memory.clock(torch.device("cuda:1"))
    memory.clock(torch.device("mps"))
    assert device_module.asked == [(torch.device("cuda:1"),), ()]
