"""Wrong input to `train`: one clear message, no traceback, exit code 2; 1 when the run had begun."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import tiny_values, write_jsonl

from lowmem_rlhf import cli
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.run.directory import RunDirectory

ROWS = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 13)]

REWARDS = """
calls = []


def broken(completions, **columns):
    raise ValueError("cannot\\nscore this")


def wrong_count(completions, **columns):
    return [0.5]


def not_a_number(completions, **columns):
    return [float("nan")] * len(completions)


def a_text(completions, **columns):
    return ["good"] * len(completions)


def fails_at_step_3(completions, completion_ids, **columns):
    calls.append(1)
    if len(calls) == 3:
        raise RuntimeError("the judge is gone")
    return [len(ids) / 12 for ids in completion_ids]


def counts_steps(completions, trainer_state, **columns):
    assert trainer_state.max_steps == 2
    return [trainer_state.global_step + n / 10 for n, _ in enumerate(completions)]


def constant(completions, **columns):
    return [1.0] * len(completions)
"""


@dataclass
class Done:
    code: int
    out: str
    err: str
    run: RunDirectory


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path, monkeypatch, capsys) -> Callable[..., Done]:
    """Return a function that trains the tiny recipe with overrides in an empty folder, on local data and rewards."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    (tmp_path / "mine.py").write_text(REWARDS)

    def command(*overrides: str, options: list[str] | None = None, **changes: Any) -> Done:
        values = tiny_values(tiny_model)
        values["data"] = {"train": "data.jsonl", "eval_size": 0, "max_prompt_length": 16}
        values |= changes
        Path("tiny.yaml").write_text(yaml.safe_dump(values))
        arguments = ["lowmem-rlhf", "train", "tiny.yaml", *overrides, "--output", "run", *(options or [])]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err, RunDirectory(Path("run")))

    return command


def one_message(done: Done) -> str:
    """Return the message of a failed command: nothing but one sentence, no traceback."""
    assert done.err.startswith("error: "), done
    assert "Traceback" not in done.err + done.out
    assert done.err.count("\n") == 1, f"one message is one line:\n{done.err}"
    return done.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model=./nowhere", ["model './nowhere' does not exist", "Hub id"]),
        ("model=package:nothing_here/a.gguf", ["package nothing_here is not installed", "pip install"]),
        ("data.train=nowhere.jsonl", ["data.train: there is no file nowhere.jsonl"]),
        ("data.train=dat.jsonl", ["there is no file dat.jsonl", "did you mean 'data.jsonl'?"]),
        ("data.train=empty.jsonl", ["empty.jsonl is empty"]),
        ("data.train=rows.jsonl", ["rows.jsonl cannot be read"]),
        ("data.train=mine.py", ["mine.py ends in .py", ".jsonl"]),
        ("data.prompt=qustion", ["no column 'qustion'", "did you mean 'question'?", "(its columns: question, answer)"]),
        ("data.answer=solution", ["data.answer: ", "no column 'solution'", "data.answer=null"]),
        ("data.max_prompt_length=3", ["its prompt has 4 tokens, data.max_prompt_length is 3", "long_prompts=drop"]),
        ("rewards=[lenght]", ["rewards: got 'lenght'", "did you mean 'length'?"]),
        ("rewards=[length]", ["length needs the option 'target'"]),
        ("rewards=[nowhere.py:f]", ["there is no file nowhere.py"]),
        ("rewards=['mine.py:brokn']", ["mine.py defines no 'brokn'", "did you mean 'broken'?"]),
        ("training.report_to=[trackio]", ["trackio is not installed", "pip install trackio"]),
        ("hardware.profile=rtx-9999", ["profile 'rtx-9999' is not known"]),
        ("hardware.vram=nonsense", ["'nonsense' is not an amount of memory", "11GB"]),
        ("hardware.vram=1MB", ["the plan does not fit", "short"]),
        ("hardware.device=vcardx", ["device 'vcardx' is not known to torch"]),
        ("lora.target_modules=[q_prj]", ["lora.target_modules: got 'q_prj'", "did you mean 'q_proj'?"]),
        ("data.chat=true", ["data.chat: got true", "no chat template"]),
    ],
)
def test_wrong_input_ends_before_anything_is_written(train, tmp_path, monkeypatch, override, parts):
    monkeypatch.setitem(sys.modules, "trackio", None)  # as where it is not installed
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.jsonl").write_text('{"question": \n')
    done = train(override)
    assert done.code == 2
    message = one_message(done)
    assert all(part in message for part in parts), message
    assert not done.run.path.exists()


def test_a_folder_without_weights_is_no_model(train, tiny_model, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tiny_model / name).read_bytes())
    done = train("model=./model")
    assert done.code == 2 and "model './model' cannot be loaded" in one_message(done)
    assert not done.run.path.exists()


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("broken", ["reward function broken failed in mine.py, line 6: ValueError: cannot score this"]),
        ("wrong_count", ["reward function wrong_count returned 1 values for 16 completions"]),
        ("not_a_number", ["reward function not_a_number returned nan for completion 1", "finite number, or None"]),
        ("a_text", ["returned 'good' for completion 1"]),
    ],
)
def test_a_reward_function_that_fails_ends_the_run(train, function, parts):
    done = train(f"rewards=['mine.py:{function}']")
    assert done.code == 1
    message = one_message(done)
    assert all(part in message for part in parts), message
    assert done.run.recipe_values()["name"] == "tiny" and not done.run.metrics()


def test_a_failure_at_step_3_keeps_two_steps_and_the_run_goes_on(train):
    rewards = "rewards=['mine.py:fails_at_step_3']"
    done = train(rewards, "training.save_steps=50", "training.max_steps=4")
    assert done.code == 1 and "RuntimeError: the judge is gone" in one_message(done)
    assert [row["step"] for row in done.run.metrics()] == [1, 2]
    assert done.run.latest_checkpoint()[0] == 2
    Path("mine.py").write_text(REWARDS.replace("== 3", "== 300"))
    done = train(rewards, "training.save_steps=50", "training.max_steps=4", options=["--resume"])
    assert done.code == 0, done.err
    assert [row["step"] for row in done.run.metrics()] == [1, 2, 3, 4]
    assert (done.run.path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_without_any_signal_is_an_error_not_a_silent_success(train):
    done = train("rewards=['mine.py:constant']")
    assert done.code == 1 and "nothing was learned" in one_message(done)
    assert len(done.run.metrics()) == 3
    assert not (done.run.path / "adapter").exists()


def test_a_first_step_without_signal_or_learning_rate_is_no_error(train):
    """All rewards equal in the first step is everyday life, and a warm-up begins with a learning rate of zero."""
    late = "def late(completion_ids, calls=[], **columns):\n    calls.append(1)\n    return "
    Path("late.py").write_text(late + "[len(i) / 12 if len(calls) > 1 else 1.0 for i in completion_ids]\n")
    done = train("rewards=['late.py:late']")
    assert done.code == 0, done.err
    assert done.run.metrics()[0]["groups/without_signal"] == 1 > done.run.metrics()[1]["groups/without_signal"]


def test_a_warm_up_from_zero_is_no_error(train):
    done = train("training.lr_scheduler_type=constant_with_warmup", "training.warmup_steps=1")
    assert done.code == 0, done.err
    assert [row["learning_rate"] for row in done.run.metrics()] == [0.0, 0.01, 0.01]


def test_an_output_folder_that_is_taken_is_refused(train, tmp_path):
    first = train("training.max_steps=1")
    assert first.code == 0, first.err
    metrics = first.run.metrics()
    again = train("training.max_steps=2")
    assert again.code == 2 and "already holds a run; continue it with --resume" in one_message(again)
    other = train("training.max_steps=2", "training.learning_rate=0.5", options=["--resume"])
    assert other.code == 2 and "training.learning_rate: was 0.01, is now 0.5" in other.err
    assert "Traceback" not in other.err
    assert RunDirectory(tmp_path / "run").metrics() == metrics
    assert train("training.max_steps=2", options=["--resume"]).code == 0


def test_foreign_files_in_the_output_folder_are_left_alone(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("all of it")
    done = train()
    assert done.code == 2 and "is not empty and holds no run (thesis.txt)" in one_message(done)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_resume_without_a_run_is_refused(train):
    done = train(options=["--resume"])
    assert done.code == 2 and "there is no run in run" in one_message(done)
    assert not done.run.path.exists()


def test_a_reward_function_can_ask_for_the_step_as_with_trl(train):
    done = train("rewards=['mine.py:counts_steps']", "training.max_steps=2")
    assert done.code == 0, done.err
    first, second = (row["reward/mean"] for row in done.run.metrics())
    assert second == pytest.approx(first + 1)


def test_ctrl_c_says_how_to_go_on(train, monkeypatch):
    from lowmem_rlhf.training.online import Trainer

    real = Trainer._train_step

    def interrupted(self, view):
        if self.step == 2:
            raise KeyboardInterrupt
        return real(self, view)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    done = train("training.max_steps=4")
    assert done.code == 130 and done.err.endswith("interrupted; step 2 is kept, --resume goes on from it\n")
    assert done.run.latest_checkpoint()[0] == 2


def test_ctrl_c_within_an_optimizer_step_loses_no_finished_step(train, monkeypatch):
    from lowmem_rlhf.training.optimizer import Optimizer

    real = Optimizer.step

    def interrupted(self, *loss, **before):
        norm = real(self, *loss, **before)
        if self.taken == 2:
            raise KeyboardInterrupt
        return norm

    monkeypatch.setattr(Optimizer, "step", interrupted)
    done = train("training.max_steps=4")
    assert done.code == 130 and done.err.endswith("interrupted; step 1 is kept, --resume goes on from it\n")
    assert done.run.latest_checkpoint()[0] == 1


def test_a_failing_run_says_what_is_kept_in_the_same_sentence(train, monkeypatch):
    from lowmem_rlhf.training.online import Trainer

    real = Trainer._rollout

    def failing(self, view):
        if self.step == 1:
            raise RunError("reward function f failed: ValueError: no")
        return real(self, view)

    monkeypatch.setattr(Trainer, "_rollout", failing)
    done = train("training.max_steps=4")
    assert done.code == 1
    assert one_message(done).endswith("failed: ValueError: no; step 1 is kept, --resume goes on from it")
    assert done.run.latest_checkpoint()[0] == 1


def test_a_resumed_run_keeps_its_precision_and_optimizer(train):
    done = train("training.max_steps=2", hardware={"device": "cpu", "quantization": "nf4", "optim": "adamw_8bit"})
    assert done.code == 0, done.err
    again = train("training.max_steps=3", options=["--resume"], hardware={"device": "cpu"})
    assert again.code == 0, again.err
    assert "going on after step 2" in again.out
    settings, reasons = again.run.plan()["settings"], again.run.plan()["reasons"]
    assert (settings["quantization"], settings["optim"]) == ("nf4", "adamw_8bit")
    assert reasons["quantization"] == "as the run began"


def test_a_damaged_checkpoint_is_one_sentence(train):
    done = train("training.max_steps=2")
    (done.run.latest_checkpoint()[1] / "optimizer.safetensors").write_bytes(b"torn")
    again = train("training.max_steps=3", options=["--resume"])
    said = one_message(again)
    assert again.code == 2 and "is whole (step-2: optimizer.safetensors has 4 bytes" in said
