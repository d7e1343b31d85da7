"""What devices of every kind can do."""

from dataclasses import replace

import pytest
import torch

from lowmem_rlhf.hardware.capabilities import CPU_PROCESS_BYTES, CUDA_CONTEXT_BYTES, Capabilities, capabilities
from lowmem_rlhf.hardware.cpu_device import cpu_device
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.memory import device_counter
from lowmem_rlhf.hardware.profiles import find_profile, profile_device

GIB = 1024**3


def device(torch_device: str, capability: tuple[int, int] | None, bf16: bool, source: str) -> Device:
    return Device(torch_device, "a card", 16 * GIB, 15 * GIB, capability, bf16, source=source)


DEVICES = {
    "cpu": cpu_device(),
    "turing": device("cuda:0", (7, 5), False, "nvml"),
    "ampere": device("cuda:1", (8, 6), True, "nvml"),
    "hopper": device("cuda:0", (9, 0), True, "nvml"),
    "rocm": replace(device("cuda:0", None, True, "torch"), backend="rocm"),  # torch calls AMD's cards cuda
    "xpu": device("xpu:0", None, True, "torch"),
    "mps": device("mps", None, True, "torch"),
    "virtual card": device("vcard:0", None, True, "torch"),
}
CUDA_LIKE = Capabilities(
    pinned_copies=True,
    graphs=True,
    four_bit_rows=64,
    eight_bit_adamw=True,
    blas_workspace=True,
    process_bytes=CUDA_CONTEXT_BYTES,
    tried=True,
    title="cards of NVIDIA",
)


@pytest.mark.parametrize(
    ("name", "kind", "half_dtype", "int8_dtype", "process_bytes"),
    [
        ("cpu", "cpu", "bfloat16", "bfloat16", CPU_PROCESS_BYTES),
        ("turing", "cuda", "float16", "float16", CUDA_CONTEXT_BYTES),
        ("ampere", "cuda", "bfloat16", "float16", CUDA_CONTEXT_BYTES),
        ("hopper", "cuda", "bfloat16", "float16", CUDA_CONTEXT_BYTES),
        ("rocm", "cuda", "bfloat16", "float16", 0),
        ("xpu", "xpu", "bfloat16", "bfloat16", 0),
        ("mps", "mps", "bfloat16", "float16", 0),
        ("virtual card", "vcard", "bfloat16", "float16", 0),
    ],
)
def test_what_follows_from_a_device(name, kind, half_dtype, int8_dtype, process_bytes):
    one = DEVICES[name]
    assert (one.kind, one.half_dtype, one.int8_dtype, one.process_bytes) == (
        kind,
        half_dtype,
        int8_dtype,
        process_bytes,
    )
    assert one.on_cpu == (name == "cpu") and one.is_present


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("turing", "ampere", "hopper"), CUDA_LIKE),
        (("rocm",), replace(CUDA_LIKE, four_bit_rows=4, tried=False, title="cards of AMD (ROCm)")),
        (
            ("xpu",),
            Capabilities(int8_kernel=False, four_bit_rows=1, eight_bit_adamw=True, title="cards of Intel (XPU)"),
        ),
        (("virtual card",), Capabilities()),
        (("mps",), Capabilities(counts_memory=False, title="Apple's chips (MPS)")),
        (
            ("cpu",),
            Capabilities(
                on_cpu=True,
                counts_memory=False,
                explicit_scores=True,
                fast_float16=False,
                int8_kernel=False,
                four_bit_rows=64,
                eight_bit_adamw=True,
                caching_allocator=False,
                process_bytes=CPU_PROCESS_BYTES,
                tried=True,
                title="CPUs",
            ),
        ),
    ],
)
def test_what_holds_for_a_kind(names, expected):
    for name in names:
        assert DEVICES[name].capabilities == expected


def test_a_kind_that_was_never_tried_is_promised_nothing():
    unknown = capabilities("npu:3")
    assert not (unknown.on_cpu or unknown.pinned_copies or unknown.graphs or unknown.blas_workspace)


@pytest.mark.parametrize("name", ["cpu", "cuda:1", "xpu:0", "mps"])
def test_torchs_devices_and_their_strings_have_the_same_answer(name):
    assert capabilities(torch.device(name)) == capabilities(name)


def test_a_cpu_takes_bfloat16_even_without_its_instructions():
    assert Device("cpu", "old", 8 * GIB, 8 * GIB, None, bf16=False).half_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("has", "compute_dtype", "multiplies"),
    [(True, "bfloat16", True), (True, "float32", False), (False, "bfloat16", False)],
)
def test_a_product_with_four_bit_weights_needs_instructions_and_bfloat16(has, compute_dtype, multiplies):
    cpu = Device("cpu", "CPU", 8 * GIB, 8 * GIB, None, bf16=True, avx512_bf16=has)
    assert cpu.multiplies_four_bit(compute_dtype) is multiplies


def test_a_profiles_device_is_not_in_this_machine():
    for key, kind in (("rtx-2080-ti", "cuda"), ("cpu", "cpu")):
        one = profile_device(find_profile(key))
        assert not one.is_present and one.kind == kind


def test_a_cpu_counts_nothing():
    assert device_counter(torch.device("cpu"), "max_memory_allocated") is None


def test_a_devices_json_has_the_fields_and_nothing_else():
    assert list(DEVICES["turing"].to_dict()) == [
        "torch_device",
        "name",
        "total_bytes",
        "free_bytes",
        "compute_capability",
        "bf16",
        "driver",
        "display_bytes",
        "other_bytes",
        "processes",
        "source",
        "notes",
        "avx512_bf16",
        "compiler",
        "slow_half",
        "cores",
        "speed",
        "backend",
    ]
