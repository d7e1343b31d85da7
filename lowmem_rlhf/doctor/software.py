"""The checks of Python and of the libraries: against the bounds of this package, and against what it is tested with."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import Any

from lowmem_rlhf.doctor.finding import Finding
from lowmem_rlhf.doctor.machine import Machine
from lowmem_rlhf.resources import shipped_file

PACKAGE = "lowmem-rlhf"
TESTED_PYTHON = ((3, 11), (3, 13))  # as the classifiers of pyproject.toml say; a test holds both together
# Libraries of which a newer minor release may compute or call otherwise; of the others a release says so by its major.
CLOSE = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
# What the projects have announced of releases to come; from their release notes, and not tried.
ANNOUNCED = {
    "trl": (
        2,
        0,
        "TRL 2 drops use_liger_kernel, use_transformers_paged and vllm_importance_sampling_cap, among others",
    ),
    "transformers": (6, 0, "transformers 6 renames gradient_checkpointing to activation_checkpointing"),
    "torch": (2, 15, "torch 2.15 has no builds for CUDA 12.6, and so none for cards before Turing"),
}


def requirements(root: Path | None = None) -> list[Any]:
    """Return what this package needs to run, as ``packaging`` reads it.

    Of a checkout it is pyproject.toml that counts: what pip has noted of it may be older.

    Args:
        root: the checkout's folder; None: the one that this package lies in, if it lies in one.
    """
    from packaging.requirements import Requirement

    file = (root or Path(__file__).resolve().parents[2]) / "pyproject.toml"
    if file.is_file():
        lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires(PACKAGE) or []
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def tested_releases() -> dict[str, str]:
    """Return the releases that this package is tested with, by the packages' canonical names (constraints.txt)."""
    from packaging.utils import canonicalize_name

    lines = shipped_file("constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pairs}


def check_python(machine: Machine) -> list[Finding]:
    """Python's version and word size."""
    oldest, newest = TESTED_PYTHON
    version = ".".join(map(str, machine.python))
    found = f"Python {version} on {machine.system}"
    tested = f"{_dotted(oldest)} to {_dotted(newest)}"
    command = f"python{_dotted(newest)} -m venv .venv"
    if machine.python[:2] < oldest:
        return [Finding("python", "error", found, f"TRL and this package need {_dotted(oldest)} or newer", command)]
    if sys.maxsize < 2**32:
        return [Finding("python", "error", f"{found}, of 32 bits", "torch has no builds for it", command)]
    if machine.python[:2] > newest:
        means = f"tested with {tested}; what fails here may be a library without a build for it"
        return [Finding("python", "warning", found, means, command)]
    return [Finding("python", "ok", found, f"tested with {tested}")]


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def check_packages(machine: Machine) -> list[Finding]:
    """Every library that this package needs: there, within the bounds, and not newer than what was tested."""
    from packaging.utils import canonicalize_name

    tested = tested_releases()
    findings, fine = [], []
    for requirement in requirements():
        installed = machine.version(requirement.name)
        finding = _package(requirement, installed, tested.get(canonicalize_name(requirement.name)))
        if finding:
            findings.append(finding)
        else:
            fine.append(f"{requirement.name} {installed}")
    if fine:
        findings.append(Finding("packages", "ok", ", ".join(fine), "within the bounds, and not newer than tested"))
    return findings


def _package(requirement: Any, installed: str | None, tested: str | None) -> Finding | None:
    """Return what is to be said of a library; None where it is as it should be."""
    from packaging.version import InvalidVersion, Version

    name, bound = requirement.name, f"{requirement.name}{requirement.specifier}"
    command = f'python -m pip install "{f"{name}=={tested}" if tested else bound}"'
    if installed is None:
        return Finding("packages", "error", f"{name} is not installed", f"this package needs {bound}", command)
    try:
        version = Version(installed)
    except InvalidVersion:
        return Finding("packages", "warning", f"{name} {installed}", "its version cannot be compared", command)
    if not requirement.specifier.contains(version, prereleases=True):
        means = f"this package needs {bound}; older releases are not tested, or its tests fail with them"
        return Finding("packages", "error", f"{name} {installed} is too old", means, command)
    if tested is None:
        return None
    digits = 2 if name in CLOSE else 1
    if version.release[:digits] <= Version(tested).release[:digits]:
        return None
    means = f"this package is tested with {tested}"
    if name in ANNOUNCED and version.release[:2] >= ANNOUNCED[name][:2]:
        means += f"; {ANNOUNCED[name][2]}"
    elif name == "torch":
        means += "; where results differ or a step fails, compare with that one"
    return Finding("packages", "warning", f"{name} {installed} is newer than tested", means, _pinned(name, command))


def _pinned(name: str, command: str) -> str | None:
    """Return the command; none for torch, whose builds are on several indexes."""
    return None if name == "torch" else command
