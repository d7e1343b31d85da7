"""Run directories of an older version, moved to another folder: they open, go on, and leave as they did then.

`tests/fixtures/old_runs` holds them and how they were made. Only the command line and files are used here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from reports import data_of
from safetensors.numpy import load_file

OLD_RUNS = Path(__file__).resolve().parents[1] / "fixtures" / "old_runs"
EXPECTED: dict[str, dict[str, Any]] = json.loads((OLD_RUNS / "expected.json").read_text(encoding="utf-8"))
MEASURED = ("time/", "memory/")  # metrics of the machine
NEAR = {"rel": 1e-3, "abs": 1e-5}  # of what other releases of torch and other processors compute


@pytest.fixture(params=EXPECTED)
def old_run(request, tmp_path, monkeypatch) -> Path:
    """Return a copy of an old run in a new folder, with its model beside it; the current folder is another one."""
    moved = shutil.copytree(OLD_RUNS, tmp_path / "moved", ignore=shutil.ignore_patterns("*.py"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Path(moved) / request.param


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def near(value: Any) -> Any:
    """Return what JSON values have to be near to; numbers of the machine left out."""
    if isinstance(value, dict):
        return {key: near(part) for key, part in value.items() if not key.startswith(MEASURED)}
    if isinstance(value, list):
        return [near(part) for part in value]
    return pytest.approx(value, **NEAR) if isinstance(value, float) else value


def computed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(MEASURED)}


def test_it_resumes_and_the_next_step_is_the_one_it_would_have_been(old_run, lowmem_rlhf):
    before = (old_run / "metrics.jsonl").read_bytes()
    expected = EXPECTED[old_run.name]
    done = lowmem_rlhf("train", old_run / "recipe.yaml", "training.max_steps=3", "--output", old_run, "--resume")
    assert done.code == 0, done.err
    assert (old_run / "metrics.jsonl").read_bytes().startswith(before)
    *_, second, third = rows(old_run, "metrics")
    known = {key: value for key, value in computed(third).items() if key in expected["metrics"]}  # others came later
    assert (second["step"], known) == (2, near(expected["metrics"]))
    assert [row for row in rows(old_run, "samples") if row["step"] == 3] == near(expected["samples"])
    evaluation = json.loads((old_run / "evaluation.json").read_text(encoding="utf-8"))
    for when, results in expected["evaluation"].items():
        assert {key: value for key, value in evaluation[when].items() if key in results} == near(results)
    assert (old_run / "checkpoints" / "step-3").is_dir()


def test_it_chats(old_run, lowmem_rlhf):
    answer = EXPECTED[old_run.name]["answer"]
    done = lowmem_rlhf("chat", old_run, "--prompt", answer["prompt"], "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == answer


def test_it_is_evaluated_to_what_its_training_measured(old_run, lowmem_rlhf):
    done = lowmem_rlhf("eval", old_run, "--json")
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    measured = json.loads((OLD_RUNS / old_run.name / "evaluation.json").read_text(encoding="utf-8"))
    for role, when in (("reference", "before"), ("policy", "after")):
        for name in ("accuracy", "reward/mean", "reward/length", "completion/mean_length", "completion/truncated"):
            assert results[role][name]["value"] == near(measured[when][name]), (role, name)


def test_it_is_exported_as_base_plus_adapter(old_run, lowmem_rlhf, tmp_path):
    done = lowmem_rlhf("export", old_run, "--format", "merged", "--output", tmp_path / "merged")
    assert done.code == 0, done.err
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", OLD_RUNS / "model"))
    adapter = load_file(old_run / "adapter" / "adapter_model.safetensors")
    config = json.loads((old_run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    for key in [key for key in adapter if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        change = adapter[key.replace("lora_A", "lora_B")] @ adapter[key] * (config["lora_alpha"] / config["r"])
        assert abs(change).max() > 1e-2
        base[name] = base[name] + change
    assert merged.keys() == base.keys()
    for name in base:
        assert merged[name] == pytest.approx(base[name], abs=1e-3), name  # merged weights have 16 bits


def test_it_is_reported(old_run, lowmem_rlhf):
    done = lowmem_rlhf("report", old_run)
    assert done.code == 0, done.err
    data = data_of(old_run / "report.html")
    assert data["samples"]["rows"][-1]["completion"] == rows(old_run, "samples")[-1]["completion"]
    assert data["columns"]["step"] == [row["step"] for row in rows(old_run, "metrics")]
