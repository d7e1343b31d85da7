"""All checks, and the report of them."""

import platform
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from lowmem_rlhf import __version__
from lowmem_rlhf.bench.checkout import commit
from lowmem_rlhf.bench.record import PRIVATE
from lowmem_rlhf.doctor import cards, four_bit, private, software, system
from lowmem_rlhf.doctor.finding import WORST, Finding, worst
from lowmem_rlhf.doctor.machine import Machine
from lowmem_rlhf.errors import one_line
from lowmem_rlhf.hardware.detect import parse_device

SCHEMA = 1
Check = Callable[[Machine], list[Finding]]

CHECKS: dict[str, Check] = {
    "device": cards.check_device,
    "driver": cards.check_driver,
    "torch": cards.check_torch,
    "cards": cards.check_cards,
    "processes": cards.check_processes,
    "bitsandbytes": four_bit.check_bitsandbytes,
    "python": software.check_python,
    "packages": software.check_packages,
    "disk": system.check_disk,
    "hub": system.check_hub,
    "shared_memory": system.check_shared_memory,
    "wsl": system.check_wsl,
}


def examine(machine: Machine) -> list[Finding]:
    """Return what every check finds, in their order.

    Checks are independent: one that fails itself is a finding, and the others go on.

    Raises:
        UserError: what was asked for is no device at all.
    """
    parse_device(machine.asked)
    findings = []
    for name, check in CHECKS.items():
        try:
            findings += check(machine)
        except Exception as error:  # whatever it is, the other checks have something to say
            found = f"this check failed itself: {type(error).__name__}: {one_line(error)}"
            findings.append(Finding(name, "error", found, "please report it"))
    return findings


def report(machine: Machine, findings: list[Finding]) -> dict[str, Any]:
    """Return what a report of a bug needs, without secrets.

    Keys: ``schema``, ``kind``, ``date`` (UTC), ``package``, ``commit``, ``status`` (the worst), ``counts`` by status,
    ``device`` (as ``detect --json`` tells, without processes and notes), ``system``, ``versions``, ``environment``,
    ``torch`` and ``bitsandbytes`` (what the process that loaded them said), ``findings``.
    """
    names = [requirement.name for requirement in software.requirements()]
    device = {key: value for key, value in machine.device.to_dict().items() if key not in PRIVATE}
    told = {
        "schema": SCHEMA,
        "kind": "doctor",
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "package": __version__,
        "commit": commit(),
        "status": worst(findings),
        "counts": {status: sum(one.status == status for one in findings) for status in WORST},
        "device": device,
        "system": {"name": machine.system, "wsl": machine.is_wsl, "container": machine.in_container, **_processor()},
        "versions": {"python": ".".join(map(str, machine.python)), **{name: machine.version(name) for name in names}},
        "environment": private.environment(machine.environment),
        "torch": machine.torch,
        "bitsandbytes": machine.four_bit,
        "findings": [finding.to_dict() for finding in findings],
    }
    secretless: dict[str, Any] = private.without_secrets(told)
    return secretless


def _processor() -> dict[str, str]:
    return {"release": platform.release().partition("-")[0], "processor": platform.machine()}
