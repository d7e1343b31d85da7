"""What the page reads of a run: columns, samples, what there is of it in a few values; bounded, and never written."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from statistics import fmean

import pytest
from page_runs import append, lines, metrics_row, sample_row, write_run

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.page import lines as lines_of_logs
from lowmem_rlhf.page.lines import Missing
from lowmem_rlhf.page.source import RunSource
from lowmem_rlhf.run.lock import LOCK, Lock
from lowmem_rlhf.run.logs import rewind_log

TOKEN = "hf_" + "a" * 30


def test_few_steps_are_told_exactly(tmp_path):
    source = RunSource(write_run(tmp_path / "run", steps=5))
    told = source.columns()
    rows = [metrics_row(step) for step in range(1, 6)]
    names = [name for name in rows[0] if name not in ("step", "kl")]  # kl never had a number
    assert told == {
        "last": 5,
        "taken_back": 0,
        "step": [1, 2, 3, 4, 5],
        "columns": {name: [pytest.approx(row[name], rel=1e-6) for row in rows] for name in names},
    }
    assert source.columns(since=3)["step"] == [4, 5]
    assert source.columns(since=5) == {"last": 5, "taken_back": 0, "step": [], "columns": {}}


def test_a_metric_that_begins_late_or_pauses_has_none_where_it_is_not(tmp_path):
    path = write_run(tmp_path / "run")
    rows = [{"a": 1.5}, {"a": None, "b": 7}, {"a": "?", "b": True}, {"a": float("inf"), "b": 8}, {"a": 10**400, "b": 9}]
    (path / "metrics.jsonl").write_text(lines({"step": step, **row} for step, row in enumerate(rows, 1)))
    assert RunSource(path).columns()["columns"] == {"a": [1.5, None, None, None, None], "b": [None, 7, None, 8, 9]}


@pytest.mark.parametrize(("steps", "points"), [(1001, 1000), (4001, 1000), (10_007, 300)])
def test_many_steps_are_means_of_neighbours_with_their_range(tmp_path, steps, points):
    path = write_run(tmp_path / "run")
    values = [(step * 7919) % 1000 / 8 for step in range(1, steps + 1)]
    rows = [
        {"step": step, "x": value, **({"rare": step} if step % 900 == 0 else {})}
        for step, value in enumerate(values, 1)
    ]
    (path / "metrics.jsonl").write_text(lines(rows))
    told = RunSource(path).columns(points=points)
    width = next(2**k for k in range(20) if -(-steps // 2**k) <= points)
    groups = [range(begin, min(begin + width, steps + 1)) for begin in range(1, steps + 1, width)]
    assert told["step"] == [(group[0] + group[-1]) // 2 for group in groups]
    parts = [[values[step - 1] for step in group] for group in groups]
    assert told["columns"]["x"] == [pytest.approx(fmean(part), rel=1e-6) for part in parts]
    assert told["low"]["x"] == [min(part) for part in parts] and told["high"]["x"] == [max(part) for part in parts]
    rare = [[step for step in group if step % 900 == 0] for group in groups]
    assert told["columns"]["rare"] == [part[0] if part else None for part in rare]
    assert told["high"]["rare"] == [part[0] if part else None for part in rare]
    assert told["last"] == steps


def test_a_late_question_about_many_steps_begins_right_behind_the_one_before(tmp_path):
    path = write_run(tmp_path / "run", steps=3000)
    told = RunSource(path).columns(since=1, points=500)
    assert told["step"][0] == 5 and len(told["step"]) == 375  # 2 to 9, and so on
    assert told["low"]["reward/mean"][0] == 0.002


def test_the_next_question_sees_a_new_line_and_no_half_one(tmp_path):
    path = write_run(tmp_path / "run", steps=2, samples=1)
    source = RunSource(path)
    assert source.columns()["last"] == 2 and source.samples()["all"] == 2
    whole = lines([metrics_row(3)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write(whole[:-1])
    assert source.columns()["last"] == 2
    with (path / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert source.columns(since=2)["step"] == [3] and source.describe()["step"] == 3
    append(path / "samples.jsonl", [sample_row(3, 0)])
    assert source.samples()["rows"][0]["step"] == 3


def test_damaged_lines_hide_no_others(tmp_path):
    path = write_run(tmp_path / "run")
    good = [lines([metrics_row(step)]).encode() for step in (1, 2, 3)]
    bad = b'{"step": 9, "ti\n[1]\n\n\xff\xfe\n{"step": true}\n{"step": null}\n{"loss": 1}\n' + b"[" * 5000 + b"\n"
    (path / "metrics.jsonl").write_bytes(good[0] + bad + good[2] + good[1])  # a step is above the one before
    source = RunSource(path)
    assert source.columns()["step"] == [1, 3] and source.columns(since=1)["step"] == [3]
    deep = b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b', "completion": "deep"}\n'
    rows = [lines([sample_row(1, place)]).encode() for place in (0, 1)]
    (path / "samples.jsonl").write_bytes(rows[0] + b"{\n[]\n" + deep + rows[1])
    found = source.samples(sort="oldest")
    assert json.dumps(found).count('"index"') == found["total"] and found["rows"][-1]["completion"].endswith("is 1.")


def test_a_line_too_long_to_be_one_is_passed_over_a_block_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_of_logs, "BLOCK", 100)
    monkeypatch.setattr(lines_of_logs, "LONGEST", 1000)
    path = write_run(tmp_path / "run", steps=1)
    append(path / "metrics.jsonl", [{"step": 2, "x": "y" * 5000}, {"step": 3}])
    source = RunSource(path)
    assert source.columns()["step"] == [1, 3]
    append(path / "metrics.jsonl", [{"step": 4}])
    assert source.columns()["step"] == [1, 3, 4] and source.columns()["taken_back"] == 0


def test_a_run_that_goes_back_is_read_anew(tmp_path):
    path = write_run(tmp_path / "run", steps=6, samples=2)
    source = RunSource(path)
    assert source.columns()["last"] == 6 and source.samples()["all"] == 12
    for name in ("metrics.jsonl", "samples.jsonl"):
        rewind_log(path / name, path / name, 2, None, name == "metrics.jsonl")
    append(path / "metrics.jsonl", [{"step": 3, "again": 1}])
    told = source.columns()
    assert (told["last"], told["taken_back"], told["step"]) == (3, 1, [1, 2, 3])
    assert told["columns"]["again"] == [None, None, 1] and source.samples()["all"] == 4
    with (path / "metrics.jsonl").open("r+b") as file:  # in place, as an append that failed is taken back
        file.truncate(len(lines([metrics_row(1)])))
        file.seek(0, os.SEEK_END)
        file.write(lines(metrics_row(step) for step in range(2, 9)).encode())
    told = source.columns()
    assert told["last"] == 8 and told["taken_back"] == 2 and "again" not in told["columns"]


def test_samples_are_found(tmp_path):
    source = RunSource(write_run(tmp_path / "run", steps=5, samples=4))

    def found(**wanted):
        told = source.samples(**wanted)
        assert told["all"] == 20 and told["total"] >= len(told["rows"])
        return [(row["step"], row["tokens"] - 5) for row in told["rows"]]

    assert found(limit=3) == [(5, 3), (5, 2), (5, 1)] and found(limit=3, offset=18) == [(1, 1), (1, 0)]
    assert found(sort="oldest", limit=2) == [(1, 0), (1, 1)]
    assert found(text="OF STEP 2 ") == [(2, 3), (2, 2), (2, 1), (2, 0)] == found(first=2, last=2)
    assert found(text="What is 4 +") == [(4, 0), (3, 1), (2, 2), (1, 3)]
    assert found(truncated=True) == [(step, 3) for step in (5, 4, 3, 2, 1)] and len(found(truncated=False)) == 15
    # the sum has the recipe's weights: 2 * exact + length
    assert found(sort="highest", limit=3) == [(5, 3), (5, 1), (4, 3)] and found(sort="lowest", limit=1) == [(1, 2)]
    assert found(low=2.4, high=2.45) == [(4, 3), (4, 1)]
    assert found(reward="length", low=0.5) == [(5, 3), (5, 2), (5, 1), (5, 0)]
    assert found(sort="longest", limit=1) == [(5, 3)] and found(sort="shortest", limit=1) == [(5, 0)]
    assert source.samples(offset=20)["rows"] == [] and source.samples(offset=20)["total"] == 20
    row = source.samples(limit=1)["rows"][0]
    assert row == {
        **sample_row(5, 3),
        "index": 19,
        "task": None,
        "reward": 2.5,
    }


def test_samples_of_tasks_have_their_weights_and_missing_rewards_come_last(tmp_path):
    tasks = [
        {"name": "sums", "rewards": [{"name": "exact", "weight": 1.0}]},
        {"name": "words", "rewards": [{"name": "exact", "weight": 10.0}, {"name": "style", "weight": 1.0}]},
    ]
    path = write_run(tmp_path / "run", tasks=tasks, rewards=[])
    rewards = [("sums", {"exact": 1.0}), ("words", {"exact": 0.5, "style": None}), ("words", {}), ("sums", None)]
    rows = [sample_row(1, n, task=task, rewards=value, judge="good") for n, (task, value) in enumerate(rewards)]
    (path / "samples.jsonl").write_text(lines(rows))
    source = RunSource(path)
    found = source.samples(sort="highest")["rows"]
    assert [(row["index"], row["task"], row["reward"]) for row in found] == [
        (1, "words", 5.0),
        (0, "sums", 1.0),
        (3, "sums", None),
        (2, "words", None),
    ]
    assert found[0]["rewards"] == {"exact": 0.5, "style": None} and found[0]["more"] == {"judge": "good"}
    assert [row["index"] for row in source.samples(task="sums")["rows"]] == [3, 0]
    assert source.samples(task="other")["total"] == 0 and source.samples(high=100.0)["total"] == 2
    assert source.describe()["tasks"] == ["sums", "words"] and source.describe()["rewards"] == ["exact", "style"]


def test_what_cannot_be_asked_of_samples_is_a_sentence(tmp_path):
    source = RunSource(write_run(tmp_path / "run", steps=1, samples=1))
    with pytest.raises(UserError, match=r"^sort: got 'newst'; did you mean 'newest'\?; give one of newest, oldest"):
        source.samples(sort="newst")
    with pytest.raises(UserError, match=r"^reward: got 'exakt'; did you mean 'exact'\?; there is exact, length$"):
        source.samples(reward="exakt", low=0.0)
    with pytest.raises(Missing, match=r"^index: there is no sample 1; they are 0 to 0$"):
        source.same_prompt(1)


def test_one_prompt_before_and_after(tmp_path):
    path = write_run(tmp_path / "run", steps=100, samples=2)
    source = RunSource(path)
    asked = source.samples(text="What is 4 + 1?", sort="oldest", limit=200)
    told = source.same_prompt(asked["rows"][-1]["index"], limit=200)
    assert told == {"total": 20, "rows": asked["rows"]} and asked["total"] == 20
    few = source.same_prompt(asked["rows"][0]["index"], limit=5)
    assert few["total"] == 20 and few["rows"] == [*asked["rows"][:3], *asked["rows"][-2:]]


def test_what_there_is_of_a_run(tmp_path):
    path = write_run(tmp_path / "run", steps=4, samples=2, left="adapter", model="tiny", description="adds")
    (path / "plan.json").write_text(json.dumps({"device": {"name": "A Card", "total_bytes": 11 * 2**30}}))
    rows = [{"step": 2, "accuracy": 0.3}, {"step": 3, "accuracy": 0.5}]
    ends = {"before": {"accuracy": 0.1, "intervals": {"accuracy": [0.05, 0.2]}}, "during": rows}
    (path / "evaluation.json").write_text(json.dumps(ends))
    (path / "evaluations.jsonl").write_text(lines([{"made": "today"}]))
    data = {"train": {"source": "arithmetic", "rows": 2000, "sha256": "ab" * 32}}
    (path / "inputs.json").write_text(json.dumps({"data": data}))
    source = RunSource(path)
    told = source.describe()
    assert {key: told[key] for key in ("name", "algorithm", "model", "state", "step", "max_steps", "seconds")} == {
        "name": "sums",
        "algorithm": "grpo",
        "model": "tiny",
        "state": "finished",
        "step": 4,
        "max_steps": 4,
        "seconds": 8.0,
    }
    assert told["recipe"] == (path / "recipe.yaml").read_text() and told["later"] == [{"made": "today"}]
    assert told["evaluation"] == ends and told["rewards"] == ["exact", "length"] and told["remarks"] == []
    assert told["headline"] == {
        "measure": "accuracy",
        "title": "accuracy",
        "before": {"value": 0.1, "text": "10.0%", "low": 0.05, "high": 0.2},
        "latest": {"value": 0.5, "text": "50.0%", "low": None, "high": None},
        "after": None,
        "text": "10.0% → 50.0%",
    }
    environment = dict(told["environment"])
    assert environment["device"] == "A Card" and environment["memory"] == "11.00 GiB"
    assert environment["data, train"] == "arithmetic, 2,000 rows, sha256 abababababab"
    assert source.summary() == {key: told[key] for key in source.summary()}
    (path / "evaluation.json").write_text(json.dumps({**ends, "after": {"accuracy": 0.75}}))
    assert source.describe()["headline"]["text"] == "10.0% → 75.0%"


@pytest.mark.parametrize("name", ["plan.json", "evaluation.json", "evaluations.jsonl", "samples.jsonl"])
def test_a_run_has_changed_when_any_file_that_is_shown_was_written(tmp_path, name):
    path = write_run(tmp_path / "run", steps=2, left="adapter")
    source = RunSource(path)
    before = source.summary()["changed"]
    (path / name).write_text("")
    os.utime(path / name, (before + 5, before + 5))
    assert source.summary()["changed"] == before + 5


def test_a_run_is_running_while_its_lock_is_held_and_stopped_before_its_end(tmp_path):
    path = write_run(tmp_path / "run", steps=2)
    source = RunSource(path)
    assert source.summary()["state"] == "stopped"
    lock = Lock(path / LOCK, "the run")
    lock.acquire()
    assert source.summary()["state"] == "running" == source.describe()["state"]
    lock.release()
    assert source.summary()["state"] == "stopped"


def test_damaged_files_are_said_and_the_rest_is_shown(tmp_path):
    path = write_run(tmp_path / "run", steps=2, samples=1)
    for name in ("plan.json", "evaluation.json"):
        (path / name).write_text("{")
    (path / "recipe.yaml").write_text("[")
    told = RunSource(path).describe()
    assert told["name"] == "run" and told["plan"] == {} == told["evaluation"] and told["recipe"] == "["
    for name in ("plan.json", "evaluation.json", "recipe.yaml"):
        assert sum(name in remark for remark in told["remarks"]) == 1
    assert told["step"] == 2 and told["max_steps"] is None and RunSource(path).samples()["rows"][0]["reward"] == 0.2


def test_a_run_that_is_gone_is_a_sentence_and_one_that_comes_back_is_read(tmp_path):
    path = write_run(tmp_path / "run", steps=2, samples=1)
    source = RunSource(path)
    source.columns()
    path.rename(tmp_path / "elsewhere")
    for ask in (source.describe, source.summary, source.columns, source.samples, lambda: source.same_prompt(0)):
        with pytest.raises(Missing, match=r"run is no longer there: the run was moved or deleted$"):
            ask()
    (tmp_path / "elsewhere").rename(path)
    assert source.columns()["last"] == 2 and source.samples()["all"] == 2
    shutil.rmtree(path)
    with pytest.raises(Missing):
        source.columns()


def test_secrets_and_the_home_folder_do_not_leave_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_run(tmp_path / "run", steps=1, model=f"{tmp_path}/models/a", description=f"with {TOKEN}")
    plan = {"settings": {"where": f"{tmp_path}/x"}, "reasons": {"a": f"https://me:secret@host/{TOKEN}"}}
    (path / "plan.json").write_text(json.dumps(plan))
    (path / "inputs.json").write_text(json.dumps({"base": {"model": f"{tmp_path}/models/a"}}))
    (path / "evaluations.jsonl").write_text(lines([{"data": f"{tmp_path}/d.jsonl"}]))
    more = {"prompt": f"in {tmp_path}/p", "completion": f"see\n{tmp_path}/c {TOKEN}", "note": [{"a": TOKEN}]}
    (path / "samples.jsonl").write_text(lines([sample_row(1, 0, **more)]))
    source = RunSource(path)
    told = json.dumps([source.describe(), source.summary(), source.samples(), source.same_prompt(0)])
    assert TOKEN not in told and str(tmp_path) not in told and "me:secret" not in told
    assert told.count("~/") >= 8 and source.describe()["plan"]["reasons"]["a"] == "https://***@host/***"


@pytest.mark.long
def test_a_long_run_is_followed_in_bounded_memory_and_answers(tmp_path):
    path = write_run(tmp_path / "run", of=100_000)
    text = "word " * 20
    with (path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {n}, "loss": {1 / n}, "pad": "{text}"}}\n' for n in range(1, 100_001))
    with (path / "samples.jsonl").open("w") as file:
        sample = f'"prompt": "p", "rewards": {{"exact": 0.5}}, "completion": "{text * 5}'
        file.writelines(f'{{"step": {n // 4}, {sample}{n}"}}\n' for n in range(20_000))
    size = sum((path / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl"))
    tracemalloc.start()
    source = RunSource(path)
    answers = [source.columns(), source.describe(), source.samples(sort="highest"), source.samples(text=" 19999")]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6 < size / 2
    assert max(len(json.dumps(answer)) for answer in answers) < 100_000
    assert answers[0]["last"] == 100_000 and 500 < len(answers[0]["step"]) <= 1000
    assert answers[2]["all"] == 20_000 and [row["index"] for row in answers[3]["rows"]] == [19_999]
    append(path / "metrics.jsonl", [metrics_row(100_001)])
    assert source.columns(since=100_000)["step"] == [100_001]


def test_a_text_without_end_is_cut_in_answers(tmp_path):
    path = write_run(tmp_path / "run")
    (path / "samples.jsonl").write_text(lines([sample_row(1, 0, completion="x" * 1_000_000)] * 3))
    (row, *_) = RunSource(path).samples()["rows"]
    assert row["completion"].endswith("x ... (980,000 more characters)") and len(row["completion"]) < 20_100
    assert RunSource(path).samples(text="x" * 900_000)["total"] == 3


def test_watching_loads_no_torch():
    program = "import lowmem_rlhf.page.server, lowmem_rlhf.api.run, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_last_step_is_found_behind_a_long_row_and_before_a_half_one(tmp_path):
    path = write_run(tmp_path / "run", steps=2)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(lines([{"step": 3, "note": "x" * 30_000}]) + '{"step": 4, ' + "x" * 30_000)
    assert RunSource(path).summary()["step"] == 3


@pytest.mark.skipif(os.name == "nt", reason="named pipes")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    path = write_run(tmp_path / "run", steps=2, samples=1)
    for name in ("samples.jsonl", "plan.json", "evaluation.json", "evaluations.jsonl", "inputs.json"):
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
    source = RunSource(path)
    assert source.columns()["last"] == 2 and source.summary()["step"] == 2
    with pytest.raises(UserError, match=r"samples.jsonl cannot be read: it is no file$"):
        source.samples()
    told = source.describe()
    assert (told["step"], told["seconds"], len(told["remarks"])) == (2, 4.0, 5)
    assert all("is no file" in remark for remark in told["remarks"])
