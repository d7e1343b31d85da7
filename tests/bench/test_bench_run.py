"""A run of parts that only pretend to measure: order, time, failures, a stop, the record and wrong options."""

import getpass
import json
import platform
from pathlib import Path

import pytest

from lowmem_rlhf.bench import run as bench_run
from lowmem_rlhf.bench.budget import Budget
from lowmem_rlhf.bench.parts import PARTS, Part, Task, chosen, with_ratio
from lowmem_rlhf.bench.record import publishable, save
from lowmem_rlhf.bench.run import BenchOptions, run_bench
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.cpu_device import cpu_device

NAMES = ["graphs", "step", "plan", "precisions", "device_tests"]
FIGURES = {"seconds": {"step": 1.0}, "peak_bytes": {"step": 8}, "prompt_lengths": [3]}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Pretended:
    """Starts no process: notes the task, lets time go by, and answers or fails."""

    def __init__(self, **errors: BaseException) -> None:
        self.started: list[str] = []
        self.errors, self.seconds, self.now = errors, 0.0, 0.0

    def __call__(self, name, work, seconds, tick):
        self.started.append(name)
        self.now += self.seconds
        tick(0.5)
        if error := self.errors.get(name.replace(".", "_")):
            raise error
        return {"model": work.model, "weights": "random", "cuda": None} if name == "prepare" else dict(FIGURES)


def test_the_parts_run_in_the_tables_order_each_in_processes_of_its_own():
    start = Pretended()
    record, path = run_bench(BenchOptions(device="cpu"), start)
    assert [part.name for part in PARTS] == NAMES and list(record["parts"]) == NAMES
    tasks = [
        "graphs.decoding",
        "step.ours",
        "step.trl",
        "plan.step",
        *(f"precisions.{q}" for q in ("nf4", "int8", "none")),
    ]
    assert start.started == ["prepare", *tasks]
    statuses = {name: part["status"] for name, part in record["parts"].items()}
    assert statuses == {**dict.fromkeys(NAMES, "done"), "device_tests": "skipped"}
    assert record["parts"]["step"]["values"]["ratio"]["seconds"] == {"step": 1.0}
    assert json.loads(path.read_text()) == record and path.name.startswith("bench-")


def test_a_part_that_takes_longer_than_what_is_left_is_left_out_and_a_shorter_one_runs(monkeypatch):
    start = Pretended()
    start.seconds = 100.0
    monkeypatch.setattr(bench_run, "Budget", lambda minutes: Budget(minutes, lambda: start.now))
    parts = (
        Part("graphs", "first", {"a": Task("x")}, 1, 50),
        Part("plan", "long", {"a": Task("x")}, 1, 200),
        Part("precisions", "short", {"a": Task("x")}, 1, 90),
        Part("step", "no time at all", {"a": Task("x")}, 1, 1),
    )
    monkeypatch.setattr(bench_run, "chosen", lambda only: parts)
    record, _ = run_bench(BenchOptions(device="cpu", minutes=5), start)
    assert start.started == ["prepare", "graphs.a", "precisions.a"]
    reasons = {name: part.get("reason") for name, part in record["parts"].items()}
    assert reasons["plan"] == "it takes about 200 s, and 100 s of 5 minutes are left"
    assert reasons["step"] == "it takes about 1 s, and 0 s of 5 minutes are left"
    assert record["parts"]["plan"]["status"] == "skipped"


def test_a_task_that_fails_costs_its_part_no_other_task_and_no_other_part():
    start = Pretended(step_trl=RunError("the device's memory ran out"), graphs_decoding=RunError("it hung"))
    record, path = run_bench(BenchOptions(device="cpu"), start)
    step, graphs = record["parts"]["step"], record["parts"]["graphs"]
    assert (step["status"], step["reason"]) == ("failed", "trl: the device's memory ran out")
    assert step["values"] == {"ours": FIGURES}
    assert (graphs["status"], graphs["reason"], graphs["values"]) == ("failed", "it hung", {})
    assert record["parts"]["precisions"]["status"] == "done"
    assert json.loads(path.read_text())["parts"] == record["parts"]


def test_a_stop_keeps_what_was_measured():
    start = Pretended(precisions_int8=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as stop:
        run_bench(BenchOptions(device="cpu", out=Path("kept.json")), start)
    assert stop.value.__notes__ == ["what was measured is kept in kept.json"]
    parts = json.loads(Path("kept.json").read_text())["parts"]
    assert [parts[name]["status"] for name in NAMES] == ["done", "done", "done", "failed", "skipped"]
    assert parts["precisions"]["values"] == {"nf4": FIGURES}
    assert parts["precisions"]["reason"] == parts["device_tests"]["reason"] == "the run was stopped"


def test_only_some_parts():
    start = Pretended()
    record, _ = run_bench(BenchOptions(device="cpu", only="plan, graphs"), start)
    assert list(record["parts"]) == ["graphs", "plan"] and len(start.started) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(only="graps"), "--only: there is no part 'graps'; did you mean 'graphs'?"),
        (BenchOptions(only=" , "), "--only: got ' , '; name one or several of graphs, step"),
        (BenchOptions(minutes=0), "--minutes: got 0; give minutes above 0 and at most 1440, such as 8"),
        (BenchOptions(minutes=float("nan")), "--minutes: got nan"),
        (BenchOptions(device="gpu9"), "device 'gpu9'"),
        (BenchOptions(device="cpu", model="./not/there"), "model './not/there' does not exist"),
        (BenchOptions(device="cpu", out=Path("/proc/a/b.json")), "--out: "),
        (BenchOptions(device="cpu", out=Path()), "--out: . is a folder"),
    ],
)
def test_a_wrong_option_is_one_sentence_before_anything_runs(options, message, tmp_path):
    start = Pretended()
    with pytest.raises(UserError) as error:
        run_bench(options, start)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not start.started and not list(tmp_path.iterdir())


def test_the_command_line_says_it_in_one_line(lowmem_rlhf):
    done = lowmem_rlhf("bench", "--only", "stp")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: --only: there is no part 'stp'; did you mean 'step'? (known: graphs, step")


def test_a_record_says_with_what_and_nothing_of_whose_machine():
    secret = Path.home() / "models" / "my-model"
    start = Pretended(step_trl=RunError(f"{secret}/model.safetensors cannot be read on {platform.node()}"))
    record, path = run_bench(BenchOptions(device="cpu"), start)
    assert record["schema"] == 1 and record["kind"] == "bench" and record["date"].endswith("Z")
    assert {"torch", "bitsandbytes", "transformers", "trl", "peft", "python", "cuda"} <= record["versions"].keys()
    assert {"name", "total_bytes", "driver"} <= record["device"].keys()
    assert not {"processes", "compiler", "notes"} & record["device"].keys()
    assert {"package", "commit", "minutes", "seconds", "model", "work"} <= record.keys()
    text = path.read_text()
    for private in (str(Path.home()), str(Path.cwd()), platform.node(), f"/{getpass.getuser()}/"):
        assert len(private) < 4 or private not in text
    assert record["parts"]["step"]["reason"].startswith("trl: model.safetensors cannot be read")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/ann/models/qwen: no config", "qwen: no config"),
        (r"'C:\Users\ann\qwen' is not there", "'qwen' is not there"),
        ("~/models/qwen/", "qwen"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("tests/integration/test_a.py::test_b[cuda:0]", "tests/integration/test_a.py::test_b[cuda:0]"),
        ("ours / TRL, see https://github.com/a/b", "ours / TRL, see https://github.com/a/b"),
    ],
)
def test_a_path_is_cut_to_its_last_part(text, kept):
    assert publishable({"a": [text]}) == {"a": [kept]}


def test_a_record_is_written_into_a_folder_that_is_not_there_yet(tmp_path):
    save({"schema": 1, "parts": {}}, tmp_path / "of" / "mine" / "bench.json")
    assert json.loads((tmp_path / "of" / "mine" / "bench.json").read_text(encoding="utf-8"))["schema"] == 1


def test_two_records_of_a_day_are_two_files():
    files = {run_bench(BenchOptions(device="cpu", only="graphs"), Pretended())[1] for _ in range(2)}
    assert len(files) == 2 and all(file.is_file() for file in files)


def test_a_ratio_needs_both_sides():
    assert with_ratio({"ours": FIGURES}) == {"ours": FIGURES}
    found = with_ratio({"ours": FIGURES, "trl": {**FIGURES, "peak_bytes": {"step": 32}}})
    assert found["ratio"]["peak_bytes"] == {"step": 0.25} and found["same_prompts"]


def test_the_device_tests_may_begin_with_less_than_they_take():
    tests = chosen("device_tests")[0]
    now = 0.0
    budget = Budget(2, lambda: now)
    assert tests.seconds(cpu_device()) > budget.left and not budget.why_not(tests, cpu_device())
