"""A stand-in for the NVIDIA driver's library, which the real pynvml loads in a subprocess."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_driver import compile_driver

HERE = Path(__file__).resolve().parent
PROGRAM = """
import json, sys
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.detect import describe, detect
try:
    device = detect(sys.argv[1])
    answer = {"device": device.to_dict(), "lines": describe(device)}
except UserError as error:
    answer = {"error": str(error)}
print(json.dumps({**answer, "torch": "torch" in sys.modules}))
"""


@dataclass
class Answer:
    """What a subprocess that called ``detect`` says."""

    device: dict[str, Any]
    lines: list[str]
    error: str | None
    torch_imported: bool
    shutdowns: int

    @property
    def notes(self) -> str:
        return "\n".join(self.device["notes"])


def run_detect(library: Path, scenario: Path, device: str = "auto", **env: str) -> Answer:
    """Call ``detect(device)`` in a fresh process that finds its NVML in the folder ``library``."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
    clean |= {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(scenario), "PYTHONPATH": str(HERE.parents[1]), **env}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device], env=clean, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    log = Path(f"{scenario}.shutdown")
    shutdowns = len(log.read_text().splitlines()) if log.exists() else 0
    return Answer(
        answer.get("device", {}), answer.get("lines", []), answer.get("error"), answer["torch"], shutdowns=shutdowns
    )


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory):
    """The folder of the compiled stand-in."""
    return compile_driver(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def detect_with(fake_nvml, tmp_path):
    """A function (scenario, device, **environment) -> Answer."""

    def call(scenario: str, device: str = "auto", **env: str) -> Answer:
        file = tmp_path / "scenario.txt"
        file.write_text(scenario)
        return run_detect(fake_nvml, file, device, **env)

    return call


@pytest.fixture
def detect_without_nvml(tmp_path):
    """A function (device, **environment) -> Answer, where the library cannot be loaded."""
    if not sys.platform.startswith("linux"):
        pytest.skip("hides the library with LD_LIBRARY_PATH")
    (tmp_path / "libnvidia-ml.so.1").touch()

    def call(device: str = "auto", **env: str) -> Answer:
        return run_detect(tmp_path, tmp_path / "none", device, **env)

    return call
