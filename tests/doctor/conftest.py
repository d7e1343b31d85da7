"""Machines that are not this one: facts put in the place of those that `Machine` would ask for."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doctor_machines import USUAL
from fake_driver import compile_driver

from lowmem_rlhf.doctor.machine import Machine

ROOT = Path(__file__).resolve().parents[2]

# Reads scenarios of the stand-in driver on standard input, and answers with what the checks say of each.
PROGRAM = """
import json, os, sys
from lowmem_rlhf.doctor.cards import check_cards, check_device, check_driver, check_processes, check_torch
from lowmem_rlhf.doctor.machine import Machine
answers = []
for scenario, told, asked, environment in json.load(sys.stdin):
    with open(os.environ["FAKE_NVML"], "w") as file:
        file.write(scenario)
    for name in [name for name in os.environ if name.startswith("CUDA_")]:
        del os.environ[name]
    os.environ.update(environment)
    machine = Machine(asked)
    machine.torch = told
    checks = (check_device, check_driver, check_torch, check_cards, check_processes)
    answers.append([finding.to_dict() for check in checks for finding in check(machine)])
print(json.dumps(answers))
"""


@pytest.fixture
def machine() -> Callable[..., Machine]:
    """Return what makes a machine in good order, but for the facts that are given."""

    def make(asked: str = "auto", **facts: Any) -> Machine:
        one = Machine(asked)
        one.__dict__.update({**USUAL, **facts})
        return one

    return make


@pytest.fixture(scope="session")
def with_drivers(tmp_path_factory) -> Callable[..., list[list[dict[str, Any]]]]:
    """Return what runs the checks of cards beside stand-in drivers, in one process that finds no other."""
    library = compile_driver(tmp_path_factory.mktemp("nvml"))

    def run(*cases: tuple[str, dict[str, Any], str, dict[str, str]]) -> list[list[dict[str, Any]]]:
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(library),
            "FAKE_NVML": str(library / "scenario.txt"),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, input=json.dumps(cases), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
