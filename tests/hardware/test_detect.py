"""Detection against a stand-in for the driver's library (conftest.py): the real pynvml reads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.cpu_device import cpu_device, ram
from lowmem_rlhf.hardware.detect import _ACCELERATOR_FILES, describe, detect, pin_cuda_order

MIB = 1024**2
TURING = "card GPU-aaaa1111 11264 800 7 5 0 NVIDIA GeForce RTX 2080 Ti\n"
ADA = "card GPU-aaaa2222 24564 20000 8 9 0 NVIDIA GeForce RTX 4090\n"
TWO = TURING + ADA
PCI = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
MIG = (
    "card GPU-bbbb 40960 600 8 0 1 NVIDIA A100-SXM4-40GB\n"
    "mig 0 MIG-c0ffee01 4864 14 NVIDIA A100-SXM4-40GB MIG 1g.5gb\n"
    "mig 0 MIG-c0ffee02 19968 2000 NVIDIA A100-SXM4-40GB MIG 3g.20gb\n"
)
no_other_accelerator = pytest.mark.skipif(
    sys.platform == "darwin" or any(os.path.exists(path) for path in _ACCELERATOR_FILES),
    reason="this machine has something for torch to find",
)


def test_one_card(detect_with):
    answer = detect_with("driver 550.54.14\n" + TURING)
    device = answer.device
    assert (device["torch_device"], device["name"]) == ("cuda:0", "NVIDIA GeForce RTX 2080 Ti")
    assert (device["total_bytes"], device["free_bytes"]) == (11264 * MIB, 10464 * MIB)
    assert device["compute_capability"] == [7, 5] and device["bf16"] is False
    assert (device["driver"], device["source"]) == ("550.54.14", "nvml")
    assert (device["display_bytes"], device["other_bytes"]) == (0, 800 * MIB)
    assert not answer.torch_imported and answer.shutdowns == 1
    assert "CUDA_DEVICE_ORDER" not in answer.notes


def test_how_fast_a_card_is_follows_from_what_its_driver_tells(detect_with):
    speed = detect_with(TURING + "speed 0 4352 1980 7000 352\n").device["speed"]
    assert speed["bandwidth_gb_s"] == pytest.approx(616)  # as it is sold
    assert (
        speed["single_tflops"] == pytest.approx(13.45, rel=0.05) and speed["half_tflops"] == 4 * speed["single_tflops"]
    )


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetNumGpuCores", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetMemoryBusWidth"]
)
def test_a_driver_that_does_not_tell_it_is_no_obstacle(detect_with, function):
    answer = detect_with(TURING + "speed 0 4352 1980 7000 352\n" + f"fail {function} 3\n")
    assert answer.error is None and answer.device["speed"] is None


def test_display_and_other_processes(detect_with):
    answer = detect_with(
        TURING
        + "process 0 graphics 900001 400 /usr/lib/xorg/Xorg\n"
        + "process 0 compute 900002 250 python\n"
        + "process 0 compute 900003 100 firefox\n"
        + "process 0 graphics 900003 100 firefox\n"
    )
    assert answer.device["display_bytes"] == 500 * MIB  # firefox is listed twice and holds its memory once
    assert answer.device["other_bytes"] == 300 * MIB
    assert {"pid": 900002, "name": "python", "kind": "compute", "bytes": 250 * MIB} in answer.device["processes"]
    assert len(answer.device["processes"]) == 3
    assert any("900001" in line and "400 MiB" in line for line in answer.lines)


def test_process_memory_that_is_not_told(detect_with):
    answer = detect_with(TURING + "process 0 graphics 900001 -1 dwm.exe\n")
    assert answer.device["processes"][0]["bytes"] is None
    assert answer.device["display_bytes"] is None and answer.device["other_bytes"] is None
    assert any("unknown" in line for line in answer.lines)


@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetGraphicsRunningProcesses_v3",
        "nvmlSystemGetProcessName",
        "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetCudaComputeCapability",
    ],
)
def test_a_call_that_is_not_supported(detect_with, function):
    answer = detect_with(TURING + "process 0 graphics 900001 400 Xorg\n" + f"fail {function} 3\n")
    assert answer.error is None and answer.device["free_bytes"] == 10464 * MIB
    assert answer.device["bf16"] is False  # bf16 is never assumed
    assert answer.shutdowns == 1


def test_a_card_that_shares_the_ram(detect_with):
    answer = detect_with("card GPU-1 0 0 12 1 0 NVIDIA GB10\nfail nvmlDeviceGetMemoryInfo 3\n")
    assert answer.device["torch_device"] == "cuda:0"
    assert answer.device["total_bytes"] == ram()[0]
    assert "share the system's RAM" in answer.notes


def test_the_card_with_most_free_memory_is_taken_and_said(detect_with):
    answer = detect_with(TWO, **PCI)
    assert answer.device["torch_device"] == "cuda:0"  # 10.2 GiB free against 4.5
    assert "most free memory" in answer.notes and "cuda:1 NVIDIA GeForce RTX 4090 with 4.5 GiB" in answer.notes
    assert "CUDA_DEVICE_ORDER" not in answer.notes


@pytest.mark.parametrize(
    ("visible", "device", "name", "torch_device"),
    [
        ("1", "auto", "4090", "cuda:0"),
        ("1,0", "auto", "2080 Ti", "cuda:1"),
        ("1,0", "cuda:0", "4090", "cuda:0"),
        ("0,1", "cuda:1", "4090", "cuda:1"),
        ("GPU-aaaa2", "auto", "4090", "cuda:0"),
        ("GPU-aaaa2222,GPU-aaaa1111", "auto", "2080 Ti", "cuda:1"),
        ("1,-1,0", "auto", "4090", "cuda:0"),  # CUDA stops at the first invalid entry
        ("1,7,0", "cuda", "4090", "cuda:0"),
        ("1x", "auto", "4090", "cuda:0"),
    ],
)
def test_cuda_visible_devices(detect_with, visible, device, name, torch_device):
    answer = detect_with(TWO, device, CUDA_VISIBLE_DEVICES=visible, **PCI)
    assert answer.device["name"].endswith(name) and answer.device["torch_device"] == torch_device


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "7", "GPU-aaaa", "GPU-ffff", "0,0"])
def test_cards_that_are_hidden(detect_with, visible):
    answer = detect_with(TWO, CUDA_VISIBLE_DEVICES=visible)
    assert answer.device["torch_device"] == "cpu" and "CUDA_VISIBLE_DEVICES" in answer.notes
    assert not answer.torch_imported
    error = detect_with(TWO, "cuda", CUDA_VISIBLE_DEVICES=visible).error
    assert "hides every NVIDIA card" in error and "2080 Ti" in error


def test_a_card_that_is_not_there(detect_with):
    error = detect_with(TWO, "cuda:3").error
    assert "'cuda:3' does not exist" in error and "cuda:1 is NVIDIA GeForce RTX 4090" in error


def test_uncertain_order_is_said(detect_with):
    assert "CUDA_DEVICE_ORDER is not set" in detect_with(TWO).notes
    assert "CUDA_DEVICE_ORDER is FASTEST_FIRST" in detect_with(TWO, CUDA_DEVICE_ORDER="FASTEST_FIRST").notes
    assert "CUDA_DEVICE_ORDER" not in detect_with(TWO, CUDA_VISIBLE_DEVICES="GPU-aaaa1").notes
    assert "CUDA_DEVICE_ORDER" not in detect_with(TURING + TURING.replace("1111", "3333")).notes


def test_pin_cuda_order_respects_the_user(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    pin_cuda_order()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    pin_cuda_order()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_mig_instance(detect_with):
    first = detect_with(MIG)
    assert first.device["name"].endswith("1g.5gb") and first.device["total_bytes"] == 4864 * MIB
    assert first.device["compute_capability"] == [8, 0] and "2 MIG instances" in first.notes
    second = detect_with(MIG, "cuda:0", CUDA_VISIBLE_DEVICES="MIG-c0ffee02")
    assert second.device["free_bytes"] == 17968 * MIB and second.device["torch_device"] == "cuda:0"
    assert "cuda:1" in detect_with(MIG, "cuda:1").error  # a process gets one instance


def test_mig_mode_without_an_instance(detect_with):
    assert "MIG mode without an instance" in detect_with(MIG.splitlines()[0] + "\n", "cuda").error


@no_other_accelerator
def test_driver_not_loaded(detect_with):
    answer = detect_with(TURING + "fail nvmlInitWithFlags 9\n")
    assert answer.device["torch_device"] == "cpu" and "Driver Not Loaded" in answer.notes
    assert not answer.torch_imported


@no_other_accelerator
def test_no_library(detect_without_nvml):
    answer = detect_without_nvml()
    assert answer.device["torch_device"] == "cpu" and answer.device["bf16"] is True and answer.notes == ""
    assert not answer.torch_imported


def test_cuda_asked_for_without_a_card(detect_without_nvml):
    answer = detect_without_nvml("cuda:0", CUDA_VISIBLE_DEVICES="")
    assert "'cuda:0' was asked for, but torch" in answer.error
    assert answer.torch_imported  # the last resort


def test_cpu():
    device = detect("cpu")
    assert (device.torch_device, device.source, device.compute_capability) == ("cpu", "cpu", None)
    assert 0 < device.free_bytes <= device.total_bytes
    assert describe(device)[0].endswith("(cpu)")


@pytest.mark.parametrize("text", ["", "gpu 0", "cuda:-1", "cuda:x", "auto:1"])
def test_nonsense_is_refused(text):
    with pytest.raises(UserError, match="is not a device"):
        detect(text)


def test_other_torch_devices():
    program = """
import types
import torch
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.detect import detect
torch.utils.rename_privateuse1_backend("vcard")
module = types.ModuleType("torch.vcard")
module.is_available, module.device_count = lambda: True, lambda: 2
torch._register_device_module("vcard", module)

def refused(device, *words):
    try:
        raise SystemExit(f"{device} was not refused: {detect(device)}")
    except UserError as error:
        assert all(word in str(error) for word in words), error

refused("vcard", "mem_get_info")
module.mem_get_info = lambda index=0: (6 * 2**30, 8 * 2**30 + index)
device = detect("vcard:1")
assert device.torch_device == "vcard:1" and device.source == "torch" and device.bf16
assert (device.free_bytes, device.total_bytes) == (6 * 2**30, 8 * 2**30 + 1)
assert detect("vcard").torch_device == "vcard:0"
refused("vcard:2", "torch finds 2")
refused("gpu", "not known to torch")
module.is_available = lambda: False
refused("vcard", "finds none")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_containers_memory_limit(tmp_path, version):
    folder = tmp_path / "memory" if version == "v1" else tmp_path
    folder.mkdir(exist_ok=True)
    limit, used = ("limit_in_bytes", "usage_in_bytes") if version == "v1" else ("max", "current")
    (folder / f"memory.{limit}").write_text(f"{100 * MIB}\n")
    (folder / f"memory.{used}").write_text(f"{60 * MIB}\n")
    (folder / "memory.stat").write_text(f"inactive_file {20 * MIB}\n")
    assert ram(tmp_path) == (100 * MIB, 60 * MIB)
    (folder / f"memory.{limit}").write_text("max\n" if version == "v2" else str(2**62))
    assert ram(tmp_path)[0] > 100 * MIB


def test_notes_of_the_cpu():
    assert "note: why" in describe(cpu_device(("why",)))


@pytest.mark.parametrize(
    ("info", "slow"),
    [
        ("model name : Ryzen\nflags : fpu sse2 avx2\n", True),
        ("model name : Xeon\nflags : fpu avx2 avx512f\n", False),
        ("model name : Xeon\nflags : fpu avx2 avx512f avx512_bf16\n", False),
        ("Features : fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_a_cpu_without_avx512_is_slow_in_16_bits(info, slow, monkeypatch):
    monkeypatch.setattr("lowmem_rlhf.hardware.cpu_device._cpu_info", lambda: info)
    device = cpu_device()
    assert device.slow_half is slow and device.avx512_bf16 is ("avx512_bf16" in info)
    assert device.cores and device.cores >= 1
