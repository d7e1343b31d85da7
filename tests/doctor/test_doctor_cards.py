"""The checks of cards, drivers and torch's builds: the real pynvml reads a stand-in for the driver's library."""

import shlex
from urllib.parse import urlparse

import pytest
from doctor_machines import CPU_TORCH, CUDA_TORCH
from packaging.requirements import Requirement

from lowmem_rlhf.doctor import builds
from lowmem_rlhf.doctor.cards import check_device, check_driver, check_torch
from lowmem_rlhf.doctor.finding import Finding

TURING = "card GPU-aaaa1111 11264 800 7 5 0 NVIDIA GeForce RTX 2080 Ti\n"
ADA = "card GPU-aaaa2222 24564 20000 8 9 0 NVIDIA GeForce RTX 4090\n"
PASCAL = "card GPU-bbbb1111 8192 0 6 1 0 NVIDIA GeForce GTX 1080\n"
MAXWELL = "card GPU-bbbb2222 4096 0 5 2 0 NVIDIA GeForce GTX 970\n"
BLACKWELL = "card GPU-cccc1111 16384 0 12 0 0 NVIDIA GeForce RTX 5080\n"


def by_check(findings: list[dict], check: str) -> list[dict]:
    return [one for one in findings if one["check"] == check]


def torch_of(command: str) -> tuple[Requirement, str]:
    """Return what a command of pip installs, and the last part of its index."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "pip", "install"] and words[5] == "--index-url" and len(words) == 7
    address = urlparse(words[6])
    assert (address.scheme, address.netloc) == ("https", "download.pytorch.org")
    return Requirement(words[4]), address.path.rpartition("/")[2]


CASES = {
    # driver, card, torch, index of the command (None: none), status of driver, status of torch
    "a build for the CPU, a new driver": ("580.95.05", TURING, CPU_TORCH, "cu130", "ok", "error"),
    "a build for the CPU, a driver of CUDA 12": ("550.54.14", TURING, CPU_TORCH, "cu126", "ok", "error"),
    "a build for the CPU, a card before Turing": ("580.95.05", PASCAL, CPU_TORCH, "cu126", "ok", "error"),
    "a build for CUDA 13, a driver of CUDA 12": ("550.54.14", TURING, CUDA_TORCH, "cu126", "error", "ok"),
    "a build without code for the card": ("580.95.05", PASCAL, CUDA_TORCH, "cu126", "ok", "error"),
    "all as it should be": ("580.95.05", BLACKWELL, CUDA_TORCH, None, "ok", "ok"),
    "a driver that no build of this torch suits": ("570.86.10", BLACKWELL, CUDA_TORCH, None, "error", "ok"),
    "a driver older than CUDA 12": ("470.82.01", TURING, CUDA_TORCH, None, "error", "ok"),
}


@pytest.fixture(scope="session")
def told(with_drivers):
    scenarios = [(f"driver {driver}\n{card}", torch, "auto", {}) for driver, card, torch, *_ in CASES.values()]
    return dict(zip(CASES, with_drivers(*scenarios), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_drivers_cards_and_builds_of_torch(told, case):
    driver, _, torch, index, driver_status, torch_status = CASES[case]
    (of_driver,), (of_torch,) = by_check(told[case], "driver"), by_check(told[case], "torch")
    assert (of_driver["status"], of_torch["status"]) == (driver_status, torch_status)
    assert driver in of_driver["found"] and torch["version"] in of_torch["found"]
    commands = {one["command"] for one in (of_driver, of_torch)} - {None}
    if index is None:
        assert not any("pip" in command for command in commands)
    else:
        (command,) = commands
        requirement, name = torch_of(command)
        assert name == index and requirement.name == "torch"
        assert requirement.specifier.contains(f"2.13.0+{index}")
        assert not requirement.specifier.contains(torch["version"])  # else pip would leave this build where it is


def test_what_a_driver_needs_is_said(told):
    (old,) = by_check(told["a driver older than CUDA 12"], "driver")
    assert "needs driver 580 or newer" in old["means"] and "update it (https://www.nvidia.com/drivers)" in old["means"]
    (between,) = by_check(told["a driver that no build of this torch suits"], "driver")
    assert "no build of this torch suits this driver" in between["means"]
    (fits,) = by_check(told["a build for CUDA 13, a driver of CUDA 12"], "driver")
    assert "either update the driver" in fits["means"] and "CUDA 12" in fits["means"]


TORCHS = [
    {"device": f"cuda:{number}", "name": name, "uuid": uuid, "capability": capability}
    for number, (name, uuid, capability) in enumerate(
        [("NVIDIA GeForce RTX 4090", "aaaa2222", [8, 9]), ("NVIDIA GeForce RTX 2080 Ti", "aaaa1111", [7, 5])]
    )
]


@pytest.fixture(scope="session")
def two_cards(with_drivers):
    """Two unlike cards, of which CUDA by itself counts the faster one first."""
    driver = "driver 580.95.05\n" + TURING + ADA
    use = "process 1 compute 900002 19000 /usr/bin/python train.py\nprocess 0 graphics 900003 300 Xorg\n"
    fastest = {**CUDA_TORCH, "cards": TORCHS}
    by_bus = {**CUDA_TORCH, "cards": [{**card, "device": f"cuda:{1 - i}"} for i, card in enumerate(TORCHS)][::-1]}
    return with_drivers(
        (driver + use, by_bus, "auto", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        (driver + use, fastest, "auto", {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}),
        (driver + use, by_bus, "cuda:1", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        (driver + use, {**CUDA_TORCH, "cards": TORCHS[:1]}, "auto", {"CUDA_VISIBLE_DEVICES": "1"}),
        (driver + PASCAL + MAXWELL, CUDA_TORCH, "auto", {}),
    )


def test_two_unlike_cards_the_chosen_one_is_named_and_the_others_use_is_shown(two_cards):
    listed, order = by_check(two_cards[0], "cards")
    assert "cuda:0 is NVIDIA GeForce RTX 2080 Ti, 0.8 of 11.0 GiB in use, which a run takes" in listed["found"]
    assert "cuda:1 is NVIDIA GeForce RTX 4090, 19.5 of 24.0 GiB in use" in listed["found"]
    assert "it has the most free memory" in listed["means"]
    assert order["status"] == "ok" and "number the 2 cards alike" in order["found"]
    assert all(one["status"] == "ok" for one in two_cards[0])


def test_an_order_that_is_not_the_drivers_is_an_error(two_cards):
    order = by_check(two_cards[1], "cards")[-1]
    assert order["status"] == "error" and order["command"] == "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
    assert "cuda:0 is NVIDIA GeForce RTX 4090, cuda:1 is NVIDIA GeForce RTX 2080 Ti" in order["found"]
    assert "FASTEST_FIRST" in order["means"]


def test_other_programs_on_the_chosen_card(two_cards):
    (alone,) = by_check(two_cards[0], "processes")
    assert alone["status"] == "ok" and "300 MiB for the display" in alone["means"]
    (busy,) = by_check(two_cards[2], "processes")
    assert busy["status"] == "warning" and busy["command"] == "kill 900002"
    assert "process 900002 (python) 19000 MiB" in busy["found"] and "/usr/bin" not in busy["found"]


def test_a_hidden_card_is_counted_and_does_not_look_like_another_order(two_cards):
    findings = by_check(two_cards[3], "cards")
    assert [one["status"] for one in findings] == ["ok", "ok"] or len(findings) == 1
    assert "CUDA_VISIBLE_DEVICES hides 1 of 2" in findings[0]["means"]
    assert "cuda:0 is NVIDIA GeForce RTX 4090" in findings[0]["found"]


def test_cards_that_are_too_old(two_cards):
    pascal, maxwell = (one for one in by_check(two_cards[4], "cards") if one["status"] != "ok")
    assert pascal["status"] == "warning" and "compute capability 6.1" in pascal["found"]
    assert maxwell["status"] == "error" and "hardware.quantization=none" in maxwell["means"]


@pytest.mark.parametrize(
    ("problem", "command"),
    [("Driver/library version mismatch", "sudo reboot"), ("Driver Not Loaded", "sudo modprobe nvidia")],
)
def test_a_driver_that_does_not_work(machine, problem, command):
    (finding,) = check_driver(machine(driver_problem=problem))
    assert (finding.status, finding.command) == ("error", command) and problem in finding.found
    (in_windows,) = check_driver(machine(driver_problem=problem, is_wsl=True))
    assert in_windows.command is None


@pytest.mark.parametrize(
    ("distribution", "command"),
    [("ubuntu", "sudo ubuntu-drivers install"), ("debian", "sudo apt install nvidia-driver"), ("gentoo", None)],
)
def test_a_card_without_a_driver(machine, distribution, command):
    (finding,) = check_driver(machine(makers=("Intel", "NVIDIA"), distribution=distribution))
    assert (finding.status, finding.command) == ("error", command)


@pytest.mark.parametrize(("maker", "index"), [("AMD", "rocm7.2"), ("Intel", "xpu")])
def test_a_build_for_the_cpu_beside_a_card_of_another_maker(machine, maker, index):
    (finding,) = check_torch(machine(makers=(maker,)))
    assert finding.status == "warning" and "never run with" in finding.means and finding.command
    requirement, name = torch_of(finding.command)
    assert name == index and str(requirement.specifier) == f"==2.13.0+{index}"
    assert check_torch(machine(makers=(maker,), torch={**CPU_TORCH, "version": "2.8.0"}))[0].command is None


def test_no_card(machine):
    assert check_driver(machine()) == [Finding("driver", "ok", "no NVIDIA card", "NVIDIA's driver is not needed")]
    (device,) = check_device(machine())
    assert device.status == "warning" and "no card to compute on" in device.found and device.command is None
    assert check_device(machine("cpu"))[0].status == "ok"
    (missing,) = check_device(machine("cuda:3", device_problem="device 'cuda:3' was asked for, but ..."))
    assert missing.status == "error" and "'cuda:3'" in missing.found


def test_torch_that_cannot_be_loaded(machine):
    (finding,) = check_torch(machine(torch={"error": "libcudart.so.13: cannot open shared object file"}))
    assert finding.status == "error" and "libcudart.so.13" in finding.found
    assert finding.command and "--force-reinstall" in finding.command


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((12, 0), ("sm_90",), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((9, 0), ("sm_90a",), True),
        ((7, 0), ("sm_75", "compute_75"), False),
        ((12, 1), ("sm_120",), True),
    ],
)
def test_which_cards_an_architecture_runs_on(capability, architectures, runs):
    assert builds.runs_on(capability, architectures) is runs


@pytest.mark.parametrize(
    ("torch", "cuda", "capability", "index"),
    [
        ("2.10.0", 12, (12, 0), "cu128"),
        ("2.13.0", 12, (12, 0), None),
        ("2.13.0", 13, None, "cu130"),
        ("2.15.0", 13, (7, 0), None),
        ("2.6.0", 13, (8, 6), "cu126"),
        ("2.13.0", 11, (8, 6), None),
        ("2.13.0", None, (8, 6), None),
    ],
)
def test_the_build_for_a_driver_and_a_card(torch, cuda, capability, index):
    build = builds.fitting_build(torch, cuda, capability)
    assert (build and build.index) == index
