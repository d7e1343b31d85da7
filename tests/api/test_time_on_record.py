"""What a finished run says of its time: in plan.json, beside what was predicted, and in a sentence."""

import statistics

import lowmem_rlhf as lm
from lowmem_rlhf.run.directory import RunDirectory


class Heard:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def phase(self, name, done=0, total=None):
        pass

    def message(self, text):
        self.messages.append(text)


def test_a_finished_run_keeps_what_a_step_took_beside_what_was_predicted(recipe, tmp_path):
    heard = Heard()
    lm.train(recipe, output="run", progress=heard)
    run = RunDirectory(tmp_path / "run")
    time, rows = run.plan()["time"], run.metrics()
    found = time["measured"]
    assert found["steps"] == 2 and len(rows) == 3  # not the first
    assert found["step_seconds"] == statistics.mean(row["time/step"] for row in rows[1:])
    assert found["phases"].keys() == time["phases"].keys()
    assert found["lengths"]["prompt"] == statistics.mean(row["prompt/mean_length"] for row in rows[1:])
    assert found["lengths"]["completion"] == statistics.mean(row["completion/mean_length"] for row in rows[1:])
    assert 0 < found["predicted"]["step_seconds"] <= 1.01 * time["step_seconds"]
    assert found["ratio"] == found["step_seconds"] / found["predicted"]["step_seconds"]
    assert any("a step took" in text and "texts of this length" in text for text in heard.messages)


def test_a_resumed_run_measures_its_own_steps_alone(recipe, tmp_path):
    lm.train(recipe, output="run", progress=None)
    longer = {**recipe, "training": {**recipe["training"], "max_steps": 5}}
    lm.train(longer, output="run", resume=True, progress=None)
    run = RunDirectory(tmp_path / "run")
    rows = run.metrics()
    found = run.plan()["time"]["measured"]
    assert len(rows) == 5 and found["steps"] == 1
    assert found["step_seconds"] == rows[4]["time/step"]
