"""The benchmark of what surviving faults costs: every part has its time, and the share is theirs of the step."""

import json
import sys

import fault_costs
import pytest
from tiny_runs import save_tiny_model, tiny_recipe


def test_every_part_has_its_time(tmp_path, monkeypatch, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny_recipe(save_tiny_model(tmp_path / "model")).to_yaml())
    monkeypatch.setattr(sys, "argv", ["fault_costs.py", "--recipe", str(file), "--steps", "2", "--json"])
    fault_costs.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found["parts"]) == 4 and all(seconds > 0 for seconds in found["parts"].values())
    assert found["added_seconds"] == pytest.approx(sum(found["parts"].values()))
    assert found["share"] == pytest.approx(found["added_seconds"] / found["step_seconds"])
    assert found["kept_bytes"] > 10_000 and found["put_back_seconds"] > 0
