"""Cards of AMD, Intel and Apple, none of which is here: detection against fakes of torch's modules; their profiles."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware import detect as detection
from lowmem_rlhf.hardware import profiles as known
from lowmem_rlhf.hardware import torch_device
from lowmem_rlhf.hardware.capabilities import backend_of, capabilities, never_run
from lowmem_rlhf.hardware.cpu_device import ram
from lowmem_rlhf.hardware.detect import describe, detect
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.memory import free_bytes, is_out_of_memory
from lowmem_rlhf.hardware.nvml import Card, Inventory, NvmlUnavailable
from lowmem_rlhf.hardware.profiles import find_profile, load_profiles, match_profile, profile_device
from lowmem_rlhf.hardware.torch_build import torch_build
from lowmem_rlhf.planning.fits import shipped_cards
from lowmem_rlhf.planning.plan import plan_for
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import load_recipe

GIB = 1024**3


class Module:
    """What ``torch.cuda`` and ``torch.xpu`` tell of one card."""

    def __init__(self, name: str, total: float, free: float | None, **properties: Any) -> None:
        self.name, self.total, self.free = name, int(total * GIB), free
        self.properties = SimpleNamespace(name=name, total_memory=self.total, uuid="1234", **properties)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def get_device_name(self, number: int) -> str:
        return self.name

    def get_device_properties(self, number: int) -> SimpleNamespace:
        return self.properties

    def get_device_capability(self, number: int) -> Any:
        return pytest.fail("only NVIDIA's capability has a meaning here")

    def get_arch_list(self) -> list[str]:
        return ["gfx1100"]

    def mem_get_info(self, number: int) -> tuple[int, int]:
        if self.free is None:
            raise RuntimeError("The device doesn't support querying the available free memory")
        return int(self.free * GIB), self.total

    def memory_allocated(self, number: int) -> int:
        return GIB


def apple(limit: float, held: float) -> SimpleNamespace:
    """Return what ``torch.mps`` tells."""
    return SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        recommended_max_memory=lambda: int(limit * GIB),
        driver_allocated_memory=lambda: int(held * GIB),
    )


@pytest.fixture
def torch_with(monkeypatch):
    """Return what puts a module in torch's place of a kind, and takes every NVIDIA driver away."""

    def missing() -> Inventory:
        raise NvmlUnavailable("no library", library_missing=True)

    def put(kind: str, module: Any, hip: str | None = None, macos: int = 15, name: str = "Apple M4 Pro") -> None:
        monkeypatch.setattr(detection, "read_nvml", missing)
        absent = SimpleNamespace(is_available=lambda: False)
        for one in ("cuda", "xpu", "mps"):
            monkeypatch.setattr(torch, one, module if one == kind else absent)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)
        monkeypatch.setattr(torch.backends.mps, "get_name", lambda: name)

    assert "torch" in sys.modules  # which lets `detect` ask it
    return put


@pytest.mark.parametrize(
    ("name", "chip", "gib", "profile", "bf16"),
    [
        ("AMD Radeon RX 7900 XTX", "gfx1100", 23.98, "rx-7900-xtx", True),
        ("AMD Radeon RX 9070 XT", "gfx1201", 15.92, "rx-9070-xt", True),
        ("Radeon RX 6800 XT", "gfx1030", 15.98, "rx-6800-xt", False),
        ("AMD Radeon RX 7600", "gfx1102", 7.98, "unknown-8gb", True),
        ("AMD Instinct MI210", "gfx90a:sramecc+:xnack-", 63.98, "unknown-64gb", True),
    ],
)
def test_a_card_of_amd(torch_with, name, chip, gib, profile, bf16):
    torch_with("cuda", Module(name, gib, 20, gcnArchName=chip), hip="7.2.1")
    device = detect()
    assert (device.torch_device, device.backend, device.compute_capability) == ("cuda:0", "rocm", None)
    assert (device.bf16, device.half_dtype) == (bf16, "bfloat16" if bf16 else "float16")
    assert (device.total_bytes, device.free_bytes, device.source) == (int(gib * GIB), 20 * GIB, "torch")
    assert not device.capabilities.tried and device.capabilities == capabilities("cuda:0")
    assert any("never run on cards of AMD (ROCm)" in line for line in describe(device))
    matched = match_profile(device)
    assert (matched.key, matched.backend) == (profile, "rocm")
    build = torch_build("cpu")
    assert build["hip"] == "7.2.1" and build["architectures"] == ["gfx1100"] and build["unreachable"] is None
    assert build["cards"] == [{"device": "cuda:0", "name": name, "uuid": "1234", "capability": None}]


def test_a_torch_for_amd_does_not_take_the_card_of_nvidia_beside(torch_with, monkeypatch):
    torch_with("cuda", Module("AMD Radeon RX 7900 XTX", 23.98, 20, gcnArchName="gfx1100"), hip="7.2.1")
    other = Card(0, "GPU-1", "NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB, 0, (8, 9))
    monkeypatch.setattr(detection, "read_nvml", lambda: Inventory("580.1", (other,)))
    assert detect().name == detect("cuda:0").name == "AMD Radeon RX 7900 XTX"
    monkeypatch.setattr(torch.version, "hip", None)
    assert (detect().name, detect().backend) == ("NVIDIA GeForce RTX 4090", "cuda")


@pytest.mark.parametrize(
    ("name", "gib", "profile"),
    [
        ("Intel(R) Arc(TM) B580 Graphics", 11.93, "arc-b580"),
        ("Intel(R) Arc(TM) B580 Graphics", 11.33, "arc-b580"),
        ("Intel(R) Arc(TM) A770 Graphics", 15.11, "arc-a770-16gb"),
        ("Intel(R) Arc(TM) A770 Graphics", 7.6, "unknown-8gb"),
    ],
)
def test_a_card_of_intel(torch_with, name, gib, profile):
    torch_with("xpu", Module(name, gib, 7, has_bfloat16_conversions=True))
    device = detect()
    assert (device.torch_device, device.backend, device.bf16) == ("xpu:0", "xpu", True)
    assert device.free_bytes == 7 * GIB and match_profile(device).key == profile
    assert device.int8_dtype == "bfloat16" and not device.capabilities.graphs
    assert any("never run on cards of Intel (XPU)" in note for note in device.notes)
    assert free_bytes(torch.device("xpu:0")) == 7 * GIB


def test_graphics_of_intel_that_do_not_tell_what_is_free(torch_with):
    torch_with("xpu", Module("Intel(R) Arc(TM) Graphics", 28, None, has_bfloat16_conversions=False))
    device = detect("xpu:0")
    assert device.total_bytes == 28 * GIB and device.free_bytes == min(27 * GIB, device.free_bytes) <= ram()[0]
    assert device.half_dtype == "float16"


@pytest.mark.parametrize(("macos", "bf16"), [(15, True), (13, False)])
def test_a_chip_of_apple(torch_with, monkeypatch, macos, bf16):
    torch_with("mps", apple(16, 1), macos=macos)
    monkeypatch.setattr(torch_device, "ram", lambda: (24 * GIB, 12 * GIB))
    device = detect()
    assert (device.torch_device, device.name, device.backend) == ("mps", "Apple M4 Pro", "mps")
    assert (device.total_bytes, device.free_bytes, device.bf16) == (16 * GIB, 12 * GIB, bf16)
    assert match_profile(device).key == "apple-m4-pro-24gb"
    assert not device.capabilities.counts_memory and not device.on_cpu
    assert free_bytes(torch.device("mps")) == 12 * GIB
    monkeypatch.setattr(torch_device, "ram", lambda: (24 * GIB, 20 * GIB))
    assert detect("mps").free_bytes == 15 * GIB  # what the driver holds already is not free


def test_a_backend_without_memory_is_refused(torch_with):
    torch_with("xpu", SimpleNamespace(is_available=lambda: True, device_count=lambda: 1))
    with pytest.raises(UserError, match="does not tell its memory"):
        detect("xpu")


def test_the_backend_of_a_device_of_this_machine(monkeypatch):
    assert backend_of("cuda:1") == "cuda" and backend_of(torch.device("xpu")) == "xpu" and backend_of("cpu") == "cpu"
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert backend_of("cuda:1") == backend_of(torch.device("cuda")) == "rocm" and backend_of("xpu") == "xpu"


OTHERS = {key: one for key, one in load_profiles().items() if not one.tried}


@pytest.mark.parametrize("key", OTHERS)
def test_a_profile_of_another_maker_is_consistent_finds_itself_and_says_that_it_was_never_run(key):
    profile = OTHERS[key]
    assert profile.memory_mib and profile.usable_mib and profile.compute_capability is None
    shared = profile.backend == "mps"
    assert (0.6 if shared else 0.9) < profile.usable_mib / profile.memory_mib < 1
    assert any(source.startswith("never run") for source in profile.sources)
    assert {"memory", "usable_mib"} <= {source.split(":")[0].split(" ")[0] for source in profile.sources}
    if shared:
        assert profile.speed is None and profile.bandwidth_gb_s
    else:
        assert profile.speed and profile.speed.half_tflops >= 1.9 * profile.speed.single_tflops
        assert any("half_tflops" in source for source in profile.sources) and profile.architecture
    device = profile_device(profile)
    assert device.backend == profile.backend and device.capabilities == known.capabilities_of(profile.backend)
    assert never_run(profile.backend) in device.notes
    name = {"rocm": "AMD ", "xpu": "Intel(R) ", "mps": ""}[profile.backend] + profile.name.split(" (")[0]
    for memory_mib in (profile.memory_mib, profile.usable_mib):
        here = replace(device, name=name, total_bytes=memory_mib * 1024**2, source="torch")
        assert match_profile(here).key == key


def test_cards_that_were_never_run_do_not_speak_for_those_that_were():
    shown = {key for card in shipped_cards() for key in card.profiles}
    assert shown and not shown & OTHERS.keys()


@pytest.mark.parametrize("key", ["rx-7900-xtx", "rx-6800-xt", "arc-b580", "apple-m4-16gb"])
def test_a_plan_for_a_card_of_another_maker(key):
    recipe = load_recipe("grpo_gsm8k", [f"hardware.profile={key}"])
    plan = plan_recipe(recipe)
    assert plan.fits and plan.profile == key
    assert plan.settings.compute_dtype == ("bfloat16" if load_profiles()[key].bf16 else "float16")
    assert (plan.time is None) == (load_profiles()[key].speed is None)
    again = Device.from_dict(plan.device.to_dict())
    assert again == plan.device and again.capabilities == plan.device.capabilities


def test_what_was_never_run_says_so_where_people_look(lowmem_rlhf):
    lines = {line.split()[0]: line for line in lowmem_rlhf("profiles").out.splitlines()}
    assert {key for key, line in lines.items() if line.endswith("never run on such")} == OTHERS.keys()
    plan = lowmem_rlhf("plan", "grpo_gsm8k", "--profile", "arc-b580")
    assert plan.code == 0 and "this package was never run on cards of Intel (XPU)" in " ".join(plan.out.split())


@pytest.mark.parametrize(("key", "optim"), [("rx-7900-xtx", "adamw_8bit"), ("apple-m4-16gb", "adamw")])
def test_8_bit_moments_where_bitsandbytes_has_them(key, optim):
    short = [f"hardware.profile={key}", "hardware.vram=1300MB", "lora.r=64"]
    plan = plan_recipe(load_recipe("grpo_gsm8k", short))
    assert plan.settings.optim == optim and "memory is short" in plan.reasons["optim"]
    pinned = load_recipe("grpo_gsm8k", [f"hardware.profile={key}", "hardware.optim=adamw_8bit"])
    if optim == "adamw":
        with pytest.raises(UserError, match=r"got adamw_8bit, which bitsandbytes does not have for Apple M4"):
            plan_recipe(pinned)
    else:
        assert plan_recipe(pinned).settings.optim == optim


def test_apples_chips_are_not_said_to_multiply_four_bit_weights_directly():
    plan = plan_recipe(load_recipe("grpo_gsm8k", ["hardware.profile=apple-m4-16gb", "hardware.quantization=nf4"]))
    assert plan.settings.rollout_weights == "quantized" and "made dense" in plan.reasons["rollout_weights"]


def test_four_bit_weights_that_are_made_dense_take_their_time(monkeypatch):
    """Rows that NVIDIA's kernel multiplies as they lie are more than those of other backends."""
    from lowmem_rlhf.architecture.lookup import model_dimensions

    recipe = load_recipe(
        "grpo_gsm8k",
        ["hardware.quantization=nf4", "hardware.rollout_weights=quantized", "hardware.rollout_batch_size=32"],
    )
    dims = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
    device = profile_device(find_profile("rx-7900-xtx"))
    times = {}
    for backend in ("cuda", "rocm"):
        plan = plan_for(recipe, replace(device, backend=backend), "x", dims)
        assert plan.time
        times[backend] = plan.time.phases["rollout"]
    assert times["rocm"] > 1.2 * times["cuda"]


@pytest.mark.parametrize(
    ("message", "ran_out"),
    [
        ("MPS backend out of memory (MPS allocated: 17.91 GB)", True),
        ("HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`", True),
        ("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)", True),
        ("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)", False),
    ],
)
def test_how_other_devices_say_that_memory_ran_out(message, ran_out):
    assert is_out_of_memory(RuntimeError(message)) is ran_out
