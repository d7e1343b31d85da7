"""The list of runs, and which run a recipe's name means."""

import json
import os
from pathlib import Path

import pytest
import yaml

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.directory import default_output, open_run
from lowmem_rlhf.run.listing import newest_run, runs_in
from lowmem_rlhf.run.lock import LOCK, Lock


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return what makes a run that is as far as it is told; each is newer than those before."""
    monkeypatch.chdir(tmp_path)
    count = 0

    def make(folder, steps, of=3, left="adapter", name="sums", **evaluation):
        nonlocal count
        count += 1
        path = tmp_path / "runs" / folder
        path.mkdir(parents=True)
        values = {"name": name, "algorithm": "grpo", "training": {"max_steps": of}}
        (path / "recipe.yaml").write_text(yaml.safe_dump(values))
        lines = [json.dumps({"step": n + 1, "time/step": 2.5}) for n in range(steps)]
        (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        os.utime(path / "metrics.jsonl", (count, count))
        if left:
            (path / left).mkdir()
        if evaluation:
            (path / "evaluation.json").write_text(json.dumps(evaluation))
        return path

    return make


def test_runs_are_told_with_state_time_and_result(made, lowmem_rlhf):
    made("sums", 3, before={"accuracy": 0.1, "headline": "accuracy"}, after={"accuracy": 0.8, "headline": "accuracy"})
    made("sums-2", 2, left=None, before={"accuracy": 0.1})
    made("early", 1, stopped="no better", before={"loss": 2.0}, after={"loss": 1.5})
    made("extended", 2, of=5)  # its adapter is that of an earlier end
    made("styles", 0, left="model", of=0)
    running = made("now", 1)
    lock = Lock(running / LOCK, "the run")
    lock.acquire()
    (running.parent / "notes").mkdir()
    broken = made("broken", 1)
    (broken / "recipe.yaml").write_text("[")
    found = {run.path.rpartition("/")[2]: run for run in runs_in()}
    lock.release()
    states = {name: run.state for name, run in found.items()}
    assert states == {
        "sums": "finished",
        "sums-2": "stopped",
        "early": "finished",
        "extended": "stopped",
        "styles": "finished",
        "now": "running",
    }
    assert list(states) == ["sums", "sums-2", "early", "extended", "styles", "now"]  # by their last line
    one = found["sums"]
    assert (one.steps, one.max_steps, one.seconds, one.headline, one.before, one.after) == (
        3,
        3,
        7.5,
        "accuracy",
        0.1,
        0.8,
    )
    done = lowmem_rlhf("runs")
    assert done.code == 0
    lines = done.out.splitlines()
    assert len(lines) == 7 and " ".join(lines[1].split()) == "runs/sums grpo finished 3 of 3 8s accuracy 10.0% -> 80.0%"
    assert "stopped" in lines[2] and "loss 2 -> 1.5" in lines[3]
    told = json.loads(lowmem_rlhf("runs", "--json").out)["runs"]
    assert [run["state"] for run in told] == [*list(states.values())[:-1], "stopped"]


def test_no_runs_is_a_sentence(tmp_path, monkeypatch, lowmem_rlhf):
    monkeypatch.chdir(tmp_path)
    assert lowmem_rlhf("runs").out == "no runs in runs; begin one with `lowmem-rlhf train RECIPE`\n"
    assert json.loads(lowmem_rlhf("runs", "elsewhere", "--json").out) == {"runs": []}


def test_a_name_is_its_newest_finished_run(made):
    made("sums-2", 3)
    made("sums", 3)  # gone on with later
    made("sums-3", 1, left=None)
    made("sums-4", 3, name="sums-4")  # of another recipe
    assert str(newest_run("sums")) == "runs/sums"
    assert str(open_run("sums").path) == "runs/sums"
    assert str(open_run("runs/sums-2").path) == "runs/sums-2"
    assert str(open_run("sums-4").path) == "runs/sums-4"
    assert newest_run("other") is None
    with pytest.raises(UserError, match=r"^other does not exist; give the folder"):
        open_run("other")


def test_a_name_without_a_finished_run_is_a_sentence(made):
    made("half", 1, left=None, name="half")
    with pytest.raises(
        UserError, match=r"^half: none of its runs is finished; runs/half is stopped after 1 of 3 steps;"
    ):
        open_run("half")


def test_a_folder_is_taken_for_itself(made, tmp_path):
    made("sums", 3)
    (tmp_path / "sums").mkdir()
    with pytest.raises(UserError, match=r"^sums is no run: it holds no recipe.yaml"):
        open_run("sums")


def test_what_goes_on_is_a_folder_and_no_other_run_is_trusted(made, lowmem_rlhf):
    trusted = sorted(path.name for path in made("sums", 3).iterdir())
    done = lowmem_rlhf("train", "quickstart", "--output", "sums", "--resume", "--trust-run")
    assert done.code == 2 and "sums does not exist; give the folder" in done.err and "newest" not in done.err
    assert sorted(path.name for path in Path("runs/sums").iterdir()) == trusted


def test_the_next_folder_of_a_name_is_free(made):
    made("sums", 3)
    made("sums-2", 3)
    assert str(default_output("sums")) == "runs/sums-3" and str(default_output("sums", resume=True)) == "runs/sums-2"
    assert str(default_output("a b/c")) == "runs/a-b-c"


def test_a_damaged_line_of_the_log_hides_no_run(made):
    made("sums", 3)
    newer = made("sums-2", 3)
    lines = (newer / "metrics.jsonl").read_text().splitlines(keepends=True)
    (newer / "metrics.jsonl").write_text("".join([lines[0], '{"step": 2, "time\n', '["step"]\n', lines[2]]))
    assert [(run.path, run.steps, run.seconds) for run in runs_in()] == [("runs/sums", 3, 7.5), ("runs/sums-2", 3, 5.0)]
    assert str(newest_run("sums")) == "runs/sums-2"


def test_a_name_is_of_its_runs_in_whatever_folder(made):
    made("sums", 3)
    made("lower_rate", 3)  # --output runs/lower_rate
    assert str(newest_run("sums")) == "runs/lower_rate" and newest_run("lower_rate") is None


def test_a_name_with_other_characters_is_had_as_its_folder_is_called(made):
    made("a-b-c", 3, name="a b/c")
    assert str(open_run("a-b-c").path) == "runs/a-b-c"
    assert newest_run("a?b?c") is None


def test_what_is_no_folder_of_runs_is_a_sentence(made, tmp_path, lowmem_rlhf):
    (tmp_path / "notes").write_text("")
    assert (
        lowmem_rlhf("runs", "notes").err == "error: notes cannot be looked at: Not a directory; give a folder of runs\n"
    )
    with pytest.raises(UserError, match=r"^run x+ is too long for a path; give the folder"):
        open_run("x" * 300)


def test_a_run_that_may_not_be_looked_at_hides_no_other(made, monkeypatch):
    made("sums", 3)
    made("theirs", 3)
    is_file = Path.is_file

    def refused(self):
        if self.parent.name == "theirs":
            raise PermissionError(13, "Permission denied")
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", refused)
    assert [run.path for run in runs_in()] == ["runs/sums"]


def test_a_model_to_evaluate_keeps_its_name_as_it_was_written(made, lowmem_rlhf):
    assert lowmem_rlhf("eval", "./nowhere").err.startswith("error: ./nowhere is no run (it holds no recipe.yaml); for")
