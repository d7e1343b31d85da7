"""The shipped profiles and how a device finds its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.profiles import (
    GIB,
    MIB,
    find_profile,
    load_profiles,
    match_profile,
    parse_bytes,
    profile_device,
)
from lowmem_rlhf.resources import shipped

OTHERS = [
    "rx-6800-xt",
    "rx-7800-xt",
    "rx-7900-xt",
    "rx-7900-xtx",
    "rx-9060-xt-16gb",
    "rx-9070-xt",
    "arc-a770-16gb",
    "arc-b580",
    "apple-m4-16gb",
    "apple-m4-pro-24gb",
    "apple-m4-max-36gb",
]
CARDS = [
    "gtx-1660-ti",
    "rtx-2060-6gb",
    "rtx-2060-12gb",
    "rtx-2070",
    "rtx-2080",
    "rtx-2080-ti",
    "rtx-3050",
    "rtx-3060-12gb",
    "rtx-3070",
    "rtx-3080-10gb",
    "rtx-3080-12gb",
    "rtx-3090",
    "rtx-4060",
    "rtx-4060-ti-16gb",
    "rtx-4070",
    "rtx-4080",
    "rtx-4090",
    "rtx-5060-ti-16gb",
    "rtx-5070",
    "rtx-5080",
    "rtx-5090",
    "t4",
    "l4",
    "a10g",
    "cpu",
]


def card(name: str, gib: float, capability: tuple[int, int] | None = (8, 6)) -> Device:
    total = int(gib * GIB)
    return Device("cuda:0", name, total, total, capability, bf16=True, source="nvml")


def test_every_listed_card_is_there():
    assert sorted(load_profiles()) == sorted(CARDS + OTHERS)
    assert len(list(shipped("profiles").iterdir())) == len(CARDS + OTHERS)


@pytest.mark.parametrize("key", [key for key in CARDS if key != "cpu"])
def test_a_profile_is_consistent_and_finds_itself(key):
    profile = load_profiles()[key]
    assert profile.memory_mib and profile.usable_mib and profile.compute_capability
    assert 0.9 < profile.usable_mib / profile.memory_mib < 1
    assert profile.bf16 == (float(profile.compute_capability) >= 8)
    assert profile.speed and profile.bandwidth_gb_s
    turing = 8 if key == "t4" else 2 if key.startswith("gtx") else 4  # of fp32 arithmetic; GeForce cards half of it
    rate = {"7.5": turing, "8.6": 2, "8.9": 4 if key == "l4" else 2, "12.0": 2}[profile.compute_capability]
    assert profile.speed.half_tflops == pytest.approx(rate * profile.speed.single_tflops, rel=0.15)
    assert any("half_tflops" in source for source in profile.sources)
    device = profile_device(profile)
    assert device.speed == profile.speed
    assert device.free_bytes == profile.usable_mib * MIB and device.source == "profile"
    name = "NVIDIA " + profile.name.split(" (")[0]
    for memory_mib in (profile.memory_mib, profile.usable_mib):  # as NVML and as torch tell it
        matched = match_profile(card(name, memory_mib / 1024))
        assert matched.key == key and name in matched.reason


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("NVIDIA GeForce RTX 3080", 10, "rtx-3080-10gb"),
        ("NVIDIA GeForce RTX 3080", 12, "rtx-3080-12gb"),
        ("NVIDIA GeForce RTX 2060", 6, "rtx-2060-6gb"),
        ("NVIDIA GeForce RTX 2060", 12, "rtx-2060-12gb"),
        ("GeForce RTX 2080 Ti", 10.76, "rtx-2080-ti"),  # the name as older drivers give it, the memory as torch does
        ("Tesla T4", 15, "t4"),
        ("NVIDIA L4", 22.49, "l4"),
    ],
)
def test_match_by_name_and_memory(name, gib, key):
    assert match_profile(card(name, gib)).key == key


@pytest.mark.parametrize(
    ("name", "gib", "capability", "key"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, (8, 9), "unknown-16gb-sm89"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8, (8, 9), "unknown-8gb-sm89"),
        ("NVIDIA GeForce RTX 3060", 8, (8, 6), "unknown-8gb-sm86"),
        ("NVIDIA GeForce RTX 3080 Ti", 12, (8, 6), "unknown-12gb-sm86"),
        ("NVIDIA GeForce RTX 2080 SUPER", 8, (7, 5), "unknown-8gb-sm75"),
        ("NVIDIA L40S", 45, (8, 9), "unknown-45gb-sm89"),
        ("Accelerator", 8, None, "unknown-8gb"),
    ],
)
def test_an_unknown_card_gets_a_derived_profile(name, gib, capability, key):
    profile = match_profile(card(name, gib, capability))
    assert profile.key == key and profile.name == name
    assert profile.usable_mib and profile.memory_mib
    assert profile.usable_mib < profile.memory_mib and "derived" in profile.reason
    assert profile_device(profile).compute_capability == capability


def test_the_reason_names_the_variant_of_other_memory():
    assert "rtx-3060-12gb has 12 GiB" in match_profile(card("NVIDIA GeForce RTX 3060", 8)).reason


def test_the_cpu():
    device = profile_device(find_profile("cpu"))
    assert device.torch_device == "cpu" and device.bf16 and 0 < device.free_bytes <= device.total_bytes
    assert match_profile(device).key == "cpu"
    assert profile_device(find_profile("cpu"), "4GB").free_bytes == 4 * GIB


def test_vram_replaces_the_memory_and_keeps_the_share():
    profile = find_profile("rtx-2080-ti")
    assert profile.usable_mib and profile.memory_mib
    device = profile_device(profile, "8GB")
    assert device.total_bytes == 8 * GIB and device.compute_capability == (7, 5) and not device.bf16
    assert device.free_bytes / device.total_bytes == pytest.approx(profile.usable_mib / profile.memory_mib)
    assert profile_device(profile, "11GB").free_bytes == profile_device(profile).free_bytes
    with pytest.raises(UserError, match="amount of memory"):
        profile_device(profile, "much")


def test_find_profile():
    assert find_profile(" RTX 2080_Ti ").key == "rtx-2080-ti"
    with pytest.raises(UserError, match=r"did you mean 'rtx-3090'\?.*known: .*rtx-4090"):
        find_profile("rtx-309")
    with pytest.raises(UserError, match="'abacus' is not known"):
        find_profile("abacus")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("11GB", 11 * GIB),
        ("11GiB", 11 * GIB),
        ("11 gb", 11 * GIB),
        ("10.5G", 10.5 * GIB),
        ("11000MiB", 11000 * MIB),
        (" 6144 mb ", 6 * GIB),
        ("1T", 1024 * GIB),
    ],
)
def test_parse_bytes(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text", ["", "11", "GB", "-1GB", "0GB", "0.0000001MB", "1e3GB", "nanGB", "11KB", "9" * 400 + "GB"]
)
def test_parse_bytes_refuses(text):
    with pytest.raises(UserError, match="is not an amount of memory; write a number with its unit"):
        parse_bytes(text)


def test_torch_is_not_imported():
    program = (
        "import sys; import lowmem_rlhf.hardware.detect, lowmem_rlhf.hardware.profiles as profiles; "
        "profiles.profile_device(profiles.find_profile('rtx-2080-ti')); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
