"""floor.py end to end on a tiny model."""

import json

import floor
import machine
import pytest


@pytest.fixture
def quick_rates(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.005)
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**22)


WORK = ["--prompts", "2", "--generations", "3", "--completion-length", "5", "--repeats", "1", "--device", "cpu"]


def test_json_holds_every_part_and_its_floor(tiny_folder, quick_rates, capsys):
    floor.main([*WORK, "--model", str(tiny_folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["work"]["completion_length"] == 5
    assert set(found["seconds"]) == {"rollout", "score", "update", "other", "step"}
    assert set(found["floor_seconds"]) == set(found["product_seconds"]) == {"rollout", "score", "update", "step"}
    for part in found["parts"]:
        assert part["floor_seconds"] == max(part["flop_seconds"], part["byte_seconds"])
        assert part["flop_seconds"] == part["flops"]["total"] / found["machine"]["flops_per_second"]
        assert part["byte_seconds"] == part["bytes"] / found["machine"]["bytes_per_second"]
    by_phase = [sum(p["floor_seconds"] for p in found["parts"] if p["phase"] == n) for n in ("rollout", "update")]
    assert by_phase == [found["floor_seconds"]["rollout"], found["floor_seconds"]["update"]]
    for phase, distance in found["distance"].items():
        assert distance == found["seconds"][phase] / found["floor_seconds"][phase] > 1


def test_table_for_people(tiny_folder, quick_rates, capsys):
    numbers = ["--quantization", "none", "--compute-dtype", "float32", "--no-checkpointing"]
    floor.main([*WORK, *numbers, "--model", str(tiny_folder)])
    text = capsys.readouterr().out
    assert "measured against the floor" in text and "GFLOP/s" in text


def test_nothing_to_time_is_refused(tiny_folder):
    with pytest.raises(SystemExit, match="--repeats: got 0"):
        floor.main(["--repeats", "0", "--model", str(tiny_folder)])
