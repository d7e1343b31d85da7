"""What the benchmark over seeds makes of finished runs; the runs themselves take minutes each."""

import json
import sys

import pytest
import seeds


def finished(folder, after, explained=None):
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("")
    (folder / "evaluation.json").write_text(json.dumps({"before": {"accuracy": 0.1}, "after": {"accuracy": after}}))
    row = {"time/step": 2.0, **({} if explained is None else {"value/explained_variance": explained})}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, **row}) + "\n" for n in (1, 2, 3)))


def test_finished_runs_are_read_and_not_run_again(tmp_path, monkeypatch, capsys):
    for seed, after in enumerate((0.5, 0.7)):
        finished(tmp_path / f"shipped-128-{seed}", after)
        finished(tmp_path / f"ppo-128-{seed}", after + 0.1, explained=0.25)
    monkeypatch.setattr(seeds.subprocess, "run", lambda *args, **options: pytest.fail("a run was begun"))
    given = ["seeds.py", "shipped", "ppo", "--seeds", "0", "1", "--completions", "128", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    seeds.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shipped   mean 60.0%  worst 50.0%  (50.0% 70.0%)  6 s"
    monkeypatch.setattr(sys, "argv", [*given, "--json"])
    seeds.main()
    found = json.loads(capsys.readouterr().out)["ways"]
    assert found["ppo"]["mean"] == pytest.approx(0.7) and found["ppo"]["worst"] == 0.6
    assert found["ppo"]["runs"]["1"]["explained_variance"] == 0.25


def test_every_way_is_a_recipe():
    from lowmem_rlhf.recipe.loading import load_recipe

    for changes in seeds.WAYS.values():
        load_recipe("quickstart", changes)
