"""TRL's losses on a device with its own memory: the same numbers as on the CPU, and float16 with loss scaling."""

import json
from pathlib import Path

import pytest
from tiny_runs import learned

from lowmem_rlhf.run.directory import RunDirectory


@pytest.fixture(scope="module")
def card(on_the_card, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    on_the_card("integration/card_trl_process.py", str(tiny_model), str(folder), made=folder / "failed.json")
    assert json.loads((folder / "failed.json").read_text()) == {}
    return folder


@pytest.mark.parametrize("case", ["trl-dpo-float32", "trl-kto-float32", "trl-orpo-float32"])
def test_a_run_on_the_card_equals_the_cpus(card, card_device, case):
    cpu, there = (learned(RunDirectory(card / f"{case}-{device}")) for device in ("cpu", "card"))
    assert RunDirectory(card / f"{case}-card").plan()["device"]["torch_device"] == card_device
    assert len(there["metrics"]) == 3
    for expected, got in zip(cpu["metrics"], there["metrics"], strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for when in ("before", "after"):
        expected, got = (one["evaluation"][when] for one in (cpu, there))
        for name in ("accuracy", "headline"):  # null or a text
            assert got.pop(name, None) == expected.pop(name, None)
        bounds, wanted = got.pop("intervals"), expected.pop("intervals")
        assert bounds.keys() == wanted.keys()
        assert all(bounds[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-4) for name in wanted)
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_float16_on_the_card_is_the_cpus_to_rounding(card):
    cpu, there = (
        learned(RunDirectory(card / f"trl-dpo-{name}"))["metrics"] for name in ("float32-cpu", "float16-card")
    )
    for expected, got in zip(cpu, there, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=2e-2)
        assert got["loss_scale/skipped_steps"] == 0 < got["grad_norm"]
    assert there[-1]["rewards/margins"] > 0
