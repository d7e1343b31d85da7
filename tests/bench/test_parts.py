"""Every part for real, on the CPU with a tiny model; and the process that a part is."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from lowmem_rlhf.bench import device_tests
from lowmem_rlhf.bench.child import run_child
from lowmem_rlhf.bench.device_tests import counted
from lowmem_rlhf.bench.part import answer, run_task
from lowmem_rlhf.bench.parts import PARTS, find_task
from lowmem_rlhf.bench.work import Work
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.files import dumps
from lowmem_rlhf.report.bench_lines import lines_of


def measured(name, work):
    """Run a part in this process; return its values, which are JSON, and its lines."""
    part = {part.name: part for part in PARTS}[name]
    seen: list[float] = []
    tasks = {one: run_task(f"{name}.{one}", work, lambda done, total: seen.append(done / total)) for one in part.tasks}
    assert seen and all(0 < share <= 1 for share in seen)
    values = json.loads(dumps(part.combine(tasks)))
    return values, lines_of(name, {"status": "done", "values": values})


def test_decoding(work):
    values, lines = measured("graphs", work)
    assert list(values["rows"]) == ["1", "3"] and values["note"] == "torch has no graphs for cpu"
    for found in values["rows"].values():
        assert found["equal_completions"] == {"waves": 1.0} and found["tokens_per_second"]["graphs"] is None
        assert min(found["tokens_per_second"][way] for way in ("without_graphs", "waves")) > 0
    assert lines[-1] == "no graphs: torch has no graphs for cpu"


def test_a_step_against_trls(work):
    values, lines = measured("step", work)
    assert values["same_prompts"] and len(values["ours"]["prompt_lengths"]) == 2
    for side in ("ours", "trl"):
        assert values[side]["tokens_generated"] == 2 * 2 * 6
        assert values[side]["peak_bytes"]["step"] >= values[side]["peak_bytes"]["update"] > 0
    assert values["ratio"]["seconds"]["step"] > 0 and values["ratio"]["peak_bytes"]["update"] > 0
    assert lines[0].startswith("ours ") and lines[-1].startswith("peak, ours / TRL: ")


def test_the_plan_against_a_step(work):
    values, lines = measured("plan", work)
    assert list(values["memory"]) == ["rollout", "score", "update", "step"]
    assert 0.9 < values["memory"]["step"]["ratio"] < 1.1
    assert set(values["seconds"]) == {"rollout", "score", "update"} and min(values["seconds"].values()) > 0
    assert (values["prompt_length"], values["completion_length"], values["prompts"]) == (24, 8, 2)
    assert lines[0].startswith("memory, measured / predicted: rollout ")
    assert lines[-1].startswith("time, ")


def test_a_plan_with_a_time_is_compared_phase_by_phase():
    from lowmem_rlhf.bench.planned import _time

    predicted = {
        "step_seconds": 10.0,
        "step_seconds_range": [8.0, 14.0],
        "phases": {"rollout": 5.0, "score": 1.0, "update": 4.0},
    }
    found = _time(predicted, {"rollout": 10.0, "score": 1.0, "update": 2.0, "export": 3.0})
    assert found is not None
    assert {name: one["ratio"] for name, one in found.items()} == {
        "rollout": 2.0,
        "score": 1.0,
        "update": 0.5,
        "step": 1.6,
    }
    assert found["step"]["range"] == [8.0, 14.0]
    assert _time(None, {"rollout": 1.0}) is None


def test_precisions(work):
    values, lines = measured("precisions", work)
    assert list(values) == ["nf4", "int8", "none"] and len(lines) == 3
    before = {name: found["bytes_before"] for name, found in values.items()}
    assert before["nf4"] < before["int8"] < before["none"]


TESTS = """
import time
import pytest

@pytest.mark.parametrize("card", ["vcard:0", "cuda:0"])
@pytest.mark.parametrize("seconds", [0, 0.1, 100])
def test_it(card, seconds):
    time.sleep(seconds)
    assert not seconds
"""


@pytest.mark.long
def test_the_tests_of_a_checkout_run_as_long_as_there_is_time(work, tmp_path, monkeypatch):
    (tmp_path / "tests" / "integration").mkdir(parents=True)
    (tmp_path / "tests" / "integration" / "test_it.py").write_text(TESTS)
    monkeypatch.setattr(device_tests, "checkout", lambda: tmp_path)
    shares: list[float] = []
    ends: list[tuple[float, Callable[[], None]]] = []  # a clock would be short on a busy machine: the third test begins

    class Timer:
        def __init__(self, seconds, end):
            ends.append((seconds, end))

        def start(self):
            pass

        cancel = start

    def progress(done, total):
        shares.append(done / total)
        if len(shares) == 2:
            ends[0][1]()

    long = replace(work, device="cuda:0", seconds=device_tests.SPARE + 60)
    with monkeypatch.context() as patched:
        patched.setattr(device_tests.threading, "Timer", Timer)
        found = device_tests.run_tests(long, progress)
    assert 0 < ends[0][0] <= 60
    failure = "tests/integration/test_it.py::test_it[0.1-cuda:0]"
    assert found == {"passed": 1, "failed": 1, "skipped": 0, "failures": [failure], "finished": False}
    assert shares == [0.33, 0.66] and lines_of("device_tests", {"status": "done", "values": found})[1].endswith(failure)
    (tmp_path / "tests" / "integration" / "test_it.py").write_text("")
    with pytest.raises(RunError, match=r"pytest ran no test: .*no tests ran"):
        device_tests.run_tests(long, lambda done, total: None)


def test_the_outcomes_of_tests_are_counted():
    lines = [
        "tests/integration/test_a.py::test_one[cuda:0] PASSED [ 20%]",
        "tests/integration/test_a.py::test_two[cuda:0] FAILED [ 40%]",
        "tests/integration/test_a.py::test_two[cuda:0] ERROR [ 40%]",
        "tests/integration/test_a.py::test_three[cuda:0-a b] SKIPPED (no card) [ 60%]",
        "tests/integration/test_a.py::test_four[cuda:0] ",
        "=== 1 passed in 3 s ===",
    ]
    found = counted(lines)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == ["tests/integration/test_a.py::test_two[cuda:0]"]


@pytest.mark.long
def test_a_task_in_a_process_of_its_own(work):
    shares: list[float] = []
    values = run_child("graphs.decoding", work, 120, shares.append)
    assert set(values["rows"]) == {"1", "3"} and shares


def test_a_process_that_takes_too_long_is_ended(work):
    began = time.monotonic()
    with pytest.raises(RunError, match="longer than 0 s"):
        run_child("graphs.decoding", work, 0.2, lambda share: None)
    assert time.monotonic() - began < 60


def test_a_process_that_dies_says_its_last_words(work, monkeypatch):
    monkeypatch.setitem(os.environ, "PYTHONHOME", "/nowhere")  # so that Python itself does not start
    with pytest.raises(RunError, match=r"its process ended with (exit code|signal) .+: ."):
        run_child("graphs.decoding", work, 60, lambda share: None)


def test_what_the_user_has_to_mend_is_told_apart(work):
    sent: list[dict] = []
    broken = Work.from_dict({**work.to_dict(), "model": "./nowhere"})
    answer("graphs.decoding", broken, lambda message: sent.append(dict(message)))
    assert sent[-1]["user"] and "does not exist" in sent[-1]["error"]
    answer("graphs.decoding", Work.from_dict({**work.to_dict(), "device": "no such"}), lambda m: sent.append(dict(m)))
    assert not sent[-1]["user"] and sent[-1]["error"].startswith("RuntimeError: ")
    with pytest.raises(UserError):
        run_child("prepare", broken, 60, lambda share: None)


def test_every_task_is_found_by_its_name():
    for part in PARTS:
        for name, task in part.tasks.items():
            assert find_task(f"{part.name}.{name}") is task
    assert find_task("prepare").function.endswith(":prepare")


def test_random_weights_have_the_sizes_of_the_model_and_write_what_is_asked(tmp_path, monkeypatch):
    from lowmem_rlhf.architecture.catalogue import Entry
    from lowmem_rlhf.bench import model as bench_model

    small = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400, "tie_word_embeddings": True}
    monkeypatch.setattr(bench_model, "entries", lambda: {"a/b": Entry("A", 1000, small, None)})
    folder = bench_model.random_model("a/b", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"]) == (32, 400)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "user: 2 + 2?\nassistant: " and tokenizer.decode(tokenizer(text)["input_ids"]) == text
