"""How busy and warm cards are, against a stand-in for the driver's library (conftest.py): the real pynvml reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowmem_rlhf.hardware.gauges import step_gauge

MIB = 1024**2
CARDS = (
    "card GPU-aaaa1111 11264 800 7 5 0 NVIDIA GeForce RTX 2080 Ti\n"
    "card GPU-aaaa2222 24564 20000 8 9 0 NVIDIA GeForce RTX 4090\n"
)
BUSY = "busy 0 93 71\nsample 0 1000 40\nsample 0 2000 60\nsample 0 3000 -1\nsample 1 1000 5\nbusy 1 7 35\n"
PROGRAM = """
import json, sys
from types import ModuleType, SimpleNamespace
torch = sys.modules["torch"] = ModuleType("torch")  # of a machine with a card
torch.cuda = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(uuid="aaaa1111"))
from lowmem_rlhf.hardware.gauges import gauges, step_gauge
step = step_gauge(SimpleNamespace(type="cuda"))
other = step_gauge(SimpleNamespace(type="xpu"))
print(json.dumps({"cards": [gauge.to_dict() for gauge in gauges()], "steps": [step(), step()], "other": other()}))
"""


def told(library, tmp_path, scenario):
    """Return what the cards of a scenario tell."""
    file = tmp_path / "scenario.txt"
    file.write_text(scenario)
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "FAKE_NVML": str(file), "PYTHONPATH": root}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_card_tells_its_use_temperature_and_memory(fake_nvml, tmp_path):
    found = told(fake_nvml, tmp_path, CARDS + BUSY)
    names = ("name", "utilization", "temperature", "used_bytes", "total_bytes")
    assert [[card[name] for name in names] for card in found["cards"]] == [
        ["NVIDIA GeForce RTX 2080 Ti", 50.0, 71.0, 800 * MIB, 11264 * MIB],
        ["NVIDIA GeForce RTX 4090", 5.0, 35.0, 20000 * MIB, 24564 * MIB],
    ]


def test_a_step_has_the_mean_of_what_is_new_and_then_what_is_now(fake_nvml, tmp_path):
    found = told(fake_nvml, tmp_path, CARDS + BUSY)
    assert found["steps"] == [
        {"gpu/utilization": 50.0, "gpu/temperature": 71.0},
        {"gpu/utilization": 93.0, "gpu/temperature": 71.0},
    ]
    assert found["other"] == {}


@pytest.mark.parametrize(
    ("more", "step"),
    [
        ("", {}),  # a card that tells neither
        (BUSY + "fail nvmlDeviceGetSamples 3\n", {"gpu/utilization": 93.0, "gpu/temperature": 71.0}),
        (BUSY + "fail nvmlDeviceGetTemperature 15\n", {"gpu/utilization": 50.0}),
        (BUSY + "fail nvmlInitWithFlags 9\n", {}),  # the driver is not loaded
        (BUSY + "fail nvmlDeviceGetHandleByUUID 6\n", {}),  # as of a MIG instance
    ],
)
def test_what_a_card_does_not_tell_is_left_out(fake_nvml, tmp_path, more, step):
    found = told(fake_nvml, tmp_path, CARDS + more)
    assert found["steps"][0] == step and len(found["cards"]) == (0 if "Init" in more else 2)


def test_without_a_driver_there_are_no_cards(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").touch()
    assert told(tmp_path, tmp_path, "") == {"cards": [], "steps": [{}, {}], "other": {}}


def test_a_cpu_is_asked_nothing(monkeypatch):
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: pytest.fail("NVML was opened"))
    assert step_gauge(torch.device("cpu"))() == {}
