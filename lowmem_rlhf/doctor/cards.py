"""The checks of cards, driver and torch's build. What they know of NVIDIA's drivers was read, not tried (`builds`)."""

import re
from typing import Any

from lowmem_rlhf.doctor import builds
from lowmem_rlhf.doctor.finding import Finding, Status
from lowmem_rlhf.doctor.machine import Machine
from lowmem_rlhf.hardware.capabilities import never_run
from lowmem_rlhf.hardware.cuda import VISIBLE
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.nvml import Card, visible_cards

GIB, MIB = 1024**3, 1024**2
A_LOT = 512 * MIB  # that other programs hold on a card: a run's micro-batches become smaller
DRIVER_PAGE = "https://www.nvidia.com/drivers"
REBOOT = re.compile(r"mismatch", re.IGNORECASE)  # "Driver/library version mismatch": updated, and not yet loaded


def check_device(machine: Machine) -> list[Finding]:
    """Which device a run takes, and why not the one that was asked for."""
    device = machine.device
    if machine.device_problem:
        return [Finding("device", "error", machine.device_problem, "a run with this device does not start")]
    free = f"{device.free_bytes / GIB:.1f} GiB free of {device.total_bytes / GIB:.1f} GiB"
    found = f"{device.name} ({device.torch_device}), {free}"
    if not device.on_cpu:
        return [Finding("device", "ok", found, _what_it_can(device))]
    if machine.asked != "auto":
        return [Finding("device", "ok", found, "the CPU was asked for")]
    notes = "; ".join(device.notes)
    means = "runs are on the CPU, where models of more than some hundred million parameters take days"
    hidden = machine.inventory is not None and bool(machine.inventory.cards) and VISIBLE in machine.environment
    command = _unset(machine, VISIBLE) if hidden else None
    return [Finding("device", "warning", f"no card to compute on: {notes or found}", means, command)]


def _unset(machine: Machine, name: str) -> str:
    return f"Remove-Item Env:{name}" if machine.system == "Windows" else f"unset {name}"


def _what_it_can(device: Device) -> str:
    """Say what this package uses of the device, and whether it was run on such."""
    graphs = "captured graphs" if device.capabilities.graphs else "no captured graphs"
    said = f"runs compute in {device.half_dtype}, with {graphs}"
    return "; ".join(filter(None, (said, never_run(device.backend or device.kind))))


def check_driver(machine: Machine) -> list[Finding]:
    """NVIDIA's driver: installed where there is a card, working, and new enough for torch's CUDA."""
    if machine.driver_problem:
        return [_broken_driver(machine)]
    if machine.inventory is None or not machine.inventory.cards:
        if "NVIDIA" in machine.makers:
            found = "there is an NVIDIA card on the PCI bus and no driver that lists it"
            return [Finding("driver", "error", found, "nothing can compute on it", _install_driver(machine))]
        others = f" (graphics of {', '.join(dict.fromkeys(machine.makers))})" if machine.makers else ""
        return [Finding("driver", "ok", f"no NVIDIA card{others}", "NVIDIA's driver is not needed")]
    driver, cuda = machine.inventory.driver, machine.torch.get("cuda")
    if not driver:
        return [Finding("driver", "warning", "the driver does not tell its version", "nothing is known of its CUDA")]
    runs = builds.cuda_of_driver(driver)
    found = f"driver {driver}, which runs programs of CUDA {runs} and older" if runs else f"driver {driver}"
    if not cuda:
        return [Finding("driver", "ok", found)]
    wanted = builds.release(cuda)[0]
    if runs and runs >= wanted:
        return [Finding("driver", "ok", f"{found}; torch was built for CUDA {cuda}")]
    least = builds.LEAST_DRIVER.get(wanted)
    means = f"torch {machine.torch['version']} was built for CUDA {cuda}, which needs driver {least} or newer"
    if least is None:
        means = f"torch {machine.torch['version']} was built for CUDA {cuda}, which is newer than this check knows of"
        return [Finding("driver", "warning", found, means)]
    build = _fitting(machine, runs)
    if build:
        says = f"{means}; either update the driver ({DRIVER_PAGE}) or take torch's build for CUDA {build.index[2:4]}"
        return [Finding("driver", "error", found, says, builds.install(machine.torch["version"], build.index))]
    says = f"{means}, and no build of this torch suits this driver: update it ({DRIVER_PAGE})"
    return [Finding("driver", "error", found, says, _install_driver(machine))]


def _broken_driver(machine: Machine) -> Finding:
    found = f"NVIDIA's driver is installed and does not work: {machine.driver_problem}"
    if REBOOT.search(machine.driver_problem):
        command = None if machine.is_wsl or machine.system == "Windows" else "sudo reboot"
        return Finding("driver", "error", found, "it was updated while it ran; start the machine anew", command)
    command = "sudo modprobe nvidia" if machine.system == "Linux" and not machine.is_wsl else None
    return Finding("driver", "error", found, "nothing can compute on the card until `nvidia-smi` lists it", command)


def _install_driver(machine: Machine) -> str | None:
    """Return the distribution's own command; None where it has none, and under WSL, whose driver is that of Windows."""
    if machine.system != "Linux" or machine.is_wsl:
        return None
    known = {
        "ubuntu": "sudo ubuntu-drivers install",
        "debian": "sudo apt install nvidia-driver",
        "arch": "sudo pacman -S nvidia-open",
    }
    return known.get(machine.distribution)


def _fitting(machine: Machine, cuda: int | None) -> builds.Build | None:
    version = machine.torch.get("version") or machine.version("torch") or ""
    return builds.fitting_build(version, cuda, machine.device.compute_capability or _first_capability(machine))


def _first_capability(machine: Machine) -> tuple[int, int] | None:
    cards = machine.inventory.cards if machine.inventory else ()
    return cards[0].compute_capability if cards else None


def check_torch(machine: Machine) -> list[Finding]:
    """Whether torch loads, and was built for the card that is here."""
    torch = machine.torch
    if torch["error"] is not None:
        version = machine.version("torch")
        command = f'python -m pip install --force-reinstall --no-deps "torch=={version}"' if version else None
        found = f"torch {version or 'is missing'}: {torch['error']}"
        return [
            Finding("torch", "error", found, "nothing computes without it", command or "python -m pip install torch")
        ]
    version = torch["version"]
    built = next((f"{name} {torch[key]}" for key, name in _BUILDS.items() if torch[key]), None)
    found = f"torch {version}, built for {built or 'the CPU alone'}"
    if machine.inventory and machine.inventory.cards and not torch["hip"]:
        return [_torch_for_nvidia(machine, found)]
    return [_torch_for_others(machine, found) if machine.device.on_cpu and not built else Finding("torch", "ok", found)]


def _torch_for_others(machine: Machine, found: str) -> Finding:
    """Judge a build for the CPU where there may be a card of AMD or Intel; processors have graphics of theirs, too."""
    maker = next((one for one in machine.makers if one in builds.OTHERS), None)
    if maker is None:
        return Finding("torch", "ok", found)
    index, build, cards = builds.OTHERS[maker]
    means = f"{cards} need torch's build for {build}, which this package was never run with (docs/cards.md)"
    command = builds.install(machine.torch["version"], index) if builds.is_on(machine.torch["version"], index) else None
    return Finding("torch", "warning", f"{found}; there are graphics of {maker}", means, command)


_BUILDS = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU"}


def _torch_for_nvidia(machine: Machine, found: str) -> Finding:
    torch, inventory = machine.torch, machine.inventory
    assert inventory is not None
    version, capability = torch["version"], machine.device.compute_capability or _first_capability(machine)
    runs = builds.cuda_of_driver(inventory.driver) if inventory.driver else max(builds.LEAST_DRIVER)
    build = _fitting(machine, runs)
    command = builds.install(version, build.index) if build else None
    if not torch["cuda"]:
        means = f"it cannot use the {inventory.cards[0].name} that the driver lists"
        if build is None:
            means += "; no build of this torch suits this driver and card: update the driver first"
        status: Status = "warning" if machine.asked != "auto" and machine.device.on_cpu else "error"
        return Finding("torch", status, found, means, command)
    if capability and torch["architectures"] and not builds.runs_on(capability, tuple(torch["architectures"])):
        means = (
            f"it has no code for compute capability {_dotted(capability)}, but for {', '.join(torch['architectures'])}"
        )
        return Finding("torch", "error", found, means, command)
    if torch["unreachable"] is not None:
        means = f"it cannot use {machine.device.name}, which the driver lists: {torch['unreachable']}"
        return Finding("torch", "error", found, means)
    return Finding("torch", "ok", found)


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def check_cards(machine: Machine) -> list[Finding]:
    """Every NVIDIA card: its number, what it can do, who is chosen, and whether CUDA counts as the driver does."""
    inventory = machine.inventory
    if inventory is None or not inventory.cards:
        return []
    findings = [_too_old(card) for card in inventory.cards if _is_too_old(card)]
    numbered = visible_cards(inventory.cards, machine.environment.get(VISIBLE))
    taken = machine.device.torch_device
    lines = []
    for number, card in enumerate(numbered):
        mark = ", which a run takes" if taken == f"cuda:{number}" else ""
        lines.append(f"cuda:{number} is {card.name}{_memory(card)}{mark}")
    hidden = len(inventory.cards) - len({card.index for card in numbered})
    means = "; ".join(note for note in machine.device.notes if note.startswith("took "))
    if hidden:
        means = "; ".join(filter(None, (means, f"{VISIBLE} hides {hidden} of {len(inventory.cards)}")))
    findings.append(Finding("cards", "ok", "; ".join(lines) or "no card is visible", means))
    return findings + _order(machine, numbered)


def _memory(card: Card) -> str:
    if card.total_bytes is None or card.used_bytes is None:
        return ""
    return f", {card.used_bytes / GIB:.1f} of {card.total_bytes / GIB:.1f} GiB in use"


def _is_too_old(card: Card) -> bool:
    return card.compute_capability is not None and card.compute_capability < builds.BITSANDBYTES_ADVISED


def _too_old(card: Card) -> Finding:
    assert card.compute_capability is not None
    found = f"{card.name} has compute capability {_dotted(card.compute_capability)}"
    if card.compute_capability < builds.BITSANDBYTES_LEAST:
        means = f"bitsandbytes 0.50 has kernels from {_dotted(builds.BITSANDBYTES_LEAST)} on: no 4-bit weights here"
        return Finding("cards", "error", found, f"{means}; hardware.quantization=none is left")
    advised = _dotted(builds.BITSANDBYTES_ADVISED)
    means = f"bitsandbytes advises {advised} and newer, and torch 2.15 ends its builds for older ones"
    return Finding("cards", "warning", found, f"{means}; this package was never run on one")


def _order(machine: Machine, numbered: list[Card]) -> list[Finding]:
    """Compare torch's list with the driver's, card by card, where torch finds any."""
    theirs: list[dict[str, Any]] = [card for card in machine.torch.get("cards", []) if card["capability"]]
    several = machine.inventory is not None and len(machine.inventory.cards) > 1
    if not (several and theirs and numbered) or any(card.is_mig for card in numbered):
        return []
    pairs = list(zip(theirs, numbered, strict=False))
    same = len(theirs) == len(numbered) and all(_is_same(one, card) for one, card in pairs)
    if same:
        return [Finding("cards", "ok", f"CUDA and the driver number the {len(numbered)} cards alike")]
    listed = ", ".join(f"{one['device']} is {one['name']}" for one in theirs)
    chosen = machine.environment.get("CUDA_DEVICE_ORDER")
    found = f"CUDA numbers the cards otherwise than the driver: for CUDA, {listed}"
    means = f"with CUDA_DEVICE_ORDER={chosen or '(not set)'} a plan is made for one card and the run starts on another"
    command = "$Env:CUDA_DEVICE_ORDER = 'PCI_BUS_ID'" if machine.system == "Windows" else _EXPORT
    return [Finding("cards", "error", found, means, command)]


_EXPORT = "export CUDA_DEVICE_ORDER=PCI_BUS_ID"


def _is_same(theirs: dict[str, Any], card: Card) -> bool:
    if theirs["uuid"] and card.uuid:
        return card.uuid.removeprefix("GPU-") == theirs["uuid"].removeprefix("GPU-")
    return bool(theirs["name"] == card.name)


def check_processes(machine: Machine) -> list[Finding]:
    """Who else holds memory of the card that a run takes, as the driver tells."""
    device = machine.device
    if device.source != "nvml":
        return []
    others = [process for process in device.processes if process["kind"] == "compute"]
    held = sum(process["bytes"] or 0 for process in others)
    told = ", ".join(f"process {one['pid']} ({_program(one['name'])}) {_held(one['bytes'])}" for one in others)
    display = f"{device.display_bytes / MIB:.0f} MiB for the display" if device.display_bytes else ""
    if not others:
        return [Finding("processes", "ok", f"no other program computes on {device.name}", display)]
    found = f"on {device.name}: {'; '.join(filter(None, (told, display)))}"
    unknown = any(process["bytes"] is None for process in others)
    if held < A_LOT and not unknown:
        return [Finding("processes", "ok", found)]
    means = f"the plan is made for the {device.free_bytes / GIB:.1f} GiB that are left; end what you do not need"
    pids = " ".join(str(process["pid"]) for process in others)
    kill = "taskkill /PID " + pids.replace(" ", " /PID ") if machine.system == "Windows" else f"kill {pids}"
    return [Finding("processes", "warning", found, means, kill)]


def _program(name: str | None) -> str:
    return re.split(r"[\\/]", name.split()[0])[-1] if name and name.split() else "name unknown"


def _held(held: int | None) -> str:
    return "memory not told" if held is None else f"{held / MIB:.0f} MiB"
