"""Evaluation while a run goes on: training is the same, resuming is exact, the best stays, the run ends early."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_supervised_training import DATA, PAIRS, built
from training_cases import digits, recipe_of, train, trainer_of
from trl_cases import LABELLED, loop_of, trl_recipe, write_rows

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.rewards.loading import Reward, load_rewards
from lowmem_rlhf.rewards.shipped import GRADED, SHIPPED
from lowmem_rlhf.rollout.rollout import Completion
from lowmem_rlhf.rollout.scores import Scores
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import measures
from lowmem_rlhf.training import evaluate as evaluating
from lowmem_rlhf.training import loop
from lowmem_rlhf.training.evaluate import Sampled, evaluate
from lowmem_rlhf.training.held_out import HeldOut
from lowmem_rlhf.training.intervals import wilson
from lowmem_rlhf.training.loop import Loop
from lowmem_rlhf.training.online import CompletionEvaluator

TINY = {"generation": {"num_generations": 2, "max_completion_length": 6}, "data": {"eval_size": 3, "train_size": 8}}
REWARD_AFTER = {2: 0.2, 4: 0.6, 6: 0.1, 8: 0.1}  # what held-out answers get more, by step: 4 is the best


def learned(run) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics less those of the machine and of evaluations, and everything that was trained."""
    other = ("time/", "memory/", "eval/")
    rows = [{key: value for key, value in row.items() if not key.startswith(other)} for row in run.metrics()]
    files = sorted((run.path / "adapter").rglob("*.safetensors"))
    return rows, {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one, other):
    (rows, tensors), (other_rows, other_tensors) = learned(one), learned(other)
    assert rows == other_rows and tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


def draws(completions, **columns):
    """A reward that takes from every global generator."""
    random.random()
    np.random.rand(3)
    torch.rand(3)
    return digits(completions)


def made(model, path, algorithm="grpo", resume=False, training=None, **evaluation):
    recipe = recipe_of(
        model,
        **TINY,
        algorithm=algorithm,
        ppo={"num_ppo_epochs": 1},
        evaluation={"steps": 2, **evaluation},
        training={"prompts_per_step": 2, "max_steps": 5, "save_steps": 3, **(training or {})},
    )
    return trainer_of(recipe, path, rising if algorithm == "grpo" else draws, resume)


def rising(completions, trainer_state, **columns):
    return [REWARD_AFTER.get(trainer_state.global_step, 0.0) + 0.01 * value for value in draws(completions)]


@pytest.mark.parametrize(("algorithm", "steps"), [("grpo", 5), ("ppo", 3)])
def test_training_is_the_same_with_evaluations_and_without(algorithm, steps, model_folder, tmp_path):
    runs = {}
    for every in (None, 2):
        trainer = made(model_folder, tmp_path / str(every), algorithm, training={"max_steps": steps}, steps=every)
        train(trainer)
        runs[every] = trainer.run
    assert_same(runs[None], runs[2])
    plain, found = runs[None].evaluation(), runs[2].evaluation()
    assert set(plain) == {"before", "after"} and "step" not in plain["before"]
    assert [row["step"] for row in found["during"]] == list(range(2, steps + 1, 2))
    assert {when: {k: v for k, v in found[when].items() if k != "step"} for when in plain} == plain
    rows = {row["step"]: row for row in runs[2].metrics()}
    for row in found["during"]:
        assert {name: rows[row["step"]][f"eval/{name}"] for name in measures(row)} == measures(row)
        assert row["intervals"]["reward/mean"][0] <= row["reward/mean"] <= row["intervals"]["reward/mean"][1]
        assert row["headline"] == rows[row["step"]]["eval/headline"] == "reward/mean"
    assert not any(key.startswith("eval/") for step in range(1, steps + 1, 2) for key in rows[step])


@pytest.mark.parametrize("algorithm", ["sft", "reward_model"])
def test_what_learns_from_texts_is_measured_as_at_its_ends(algorithm, model_folder, tmp_path):
    runs = []
    for every in (None, 2):
        sections = {"data": DATA if algorithm == "sft" else PAIRS, "evaluation": {"steps": every}}
        trainer = built(model_folder, algorithm, tmp_path / str(every), sections=sections, max_steps=4)
        train(trainer)
        runs.append(trainer.run)
    assert_same(*runs)
    found, headline = runs[1].evaluation(), {"sft": "loss", "reward_model": "accuracy"}[algorithm]
    assert found["after"] == found["during"][-1] and [row["step"] for row in found["during"]] == [2, 4]
    assert measures(found["after"]) == measures(runs[0].evaluation()["after"])
    assert all(row["headline"] == headline and headline in row["intervals"] for row in found["during"])


class Killed(BaseException):
    """What a kill is to this process: nothing is saved for it."""


# what stops the run, at which call, before or behind its work, and whether it can save what is finished
MOMENTS = {
    "within an evaluation": (CompletionEvaluator, "evaluate", 2, False, True),
    "its results are not written": (HeldOut, "write", 3, False, True),
    "a kill behind an evaluation": (HeldOut, "write", 3, True, False),
    "the best is saved": (loop, "save_checkpoint", 2, True, False),
}


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    trainer = made(model_folder, tmp_path_factory.mktemp("runs") / "whole", keep_best=True)
    train(trainer)
    return trainer.run


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_resumed_run_has_each_evaluation_once(moment, model_folder, tmp_path, monkeypatch, whole):
    owner, name, call, after, saves = MOMENTS[moment]
    trainer = made(model_folder, tmp_path / "run", keep_best=True)
    real, calls = getattr(owner, name), iter(range(1, 100))

    def stopping(*args, **given):
        now = next(calls) == call
        if now and not after:
            raise Killed
        result = real(*args, **given)
        if now:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        if not saves:
            patch.setattr(Loop, "_keep", lambda self: "")
        with pytest.raises(Killed):
            train(trainer)
    again = made(model_folder, tmp_path / "run", resume=True, keep_best=True)
    assert again.step < 5
    train(again)
    assert_same(again.run, whole)
    assert again.run.evaluation() == whole.evaluation() and again.run.metrics()[1].keys() == whole.metrics()[1].keys()
    assert again.run.best_step() == 4 in dict(again.run.checkpoints())


def test_the_best_checkpoint_stays_and_the_run_ends_where_nothing_gets_better(model_folder, tmp_path):
    changes = {"training": {"max_steps": 9, "save_steps": 1, "save_total_limit": 1}, "keep_best": True}
    trainer = made(model_folder, tmp_path / "run", **changes, patience=2)
    found, said = train(trainer)
    run = trainer.run
    assert [row["step"] for row in found["during"]] == [2, 4, 6, 8] and found["after"] == found["during"][-1]
    assert [step for step, _ in run.checkpoints()] == [4, 8]
    best = {"step": 4, "metric": "reward/mean", "value": found["during"][1]["reward/mean"]}
    assert found["best"] == best
    assert found["stopped"] in said and "ends after step 8 of 9" in found["stopped"]
    assert any("after step 4; its checkpoint is kept" in line for line in said)
    opened = OpenRun.at(run, "best")
    assert opened.step == 4 and opened.adapter_folder.name == "step-4"
    assert OpenRun.at(run, None).adapter_folder.name == "adapter"

    again = made(model_folder, tmp_path / "run", resume=True, **changes, patience=2)  # it has ended, and ends so again
    assert train(again)[0] == found and again.step == 8
    on = made(model_folder, tmp_path / "run", resume=True, **changes, patience=None)
    longer, _ = train(on)
    assert on.step == 9 and longer["during"] == found["during"] and longer["after"]["step"] == 9
    assert "stopped" not in longer and longer["best"] == best and [step for step, _ in run.checkpoints()] == [4, 9]


def test_a_run_without_a_best_checkpoint_says_how_to_have_one(tmp_path):
    with pytest.raises(UserError, match=r"--step best: the run in .* has kept no best checkpoint; evaluation"):
        OpenRun.at(RunDirectory(tmp_path), "best")


def test_a_measure_that_there_is_not_is_refused_before_the_first_step(model_folder, tmp_path):
    trainer = made(model_folder, tmp_path / "run", metric="acuracy")
    with pytest.raises(
        UserError, match=r"evaluation.metric: got 'acuracy'; what this run measures is accuracy, .*'accuracy'"
    ):
        train(trainer)
    assert not trainer.run.metrics()


def test_evaluations_that_are_further_apart_than_the_run_is_long_are_said(model_folder, tmp_path):
    found, said = train(made(model_folder, tmp_path / "run", steps=50))
    assert "evaluation.steps: 50 is more than the run's 5 steps, so only its ends are evaluated" in said
    assert "during" not in found


def judged(monkeypatch, values, judge=None, **options):
    """Return the headline of an evaluation in which the reward gave these values."""
    sampled = Sampled([Completion([1], [0.0], False)] * len(values), Scores({"r": values}, [0.0] * len(values)), 1, 1.0)
    monkeypatch.setattr(evaluating, "sample", lambda *args: sampled)
    recipe = recipe_of("model", rewards=[{"function": judge or "mine.py:f", "name": "r", **options}])
    reward = Reward("r", digits) if judge is None else load_rewards(recipe.rewards)[0]
    return evaluate(None, None, [None] * len(values), recipe, [reward], None, None)["headline"]


def test_a_reward_that_is_a_degree_is_not_reported_as_accuracy(monkeypatch):
    assert judged(monkeypatch, [0.0, 1.0, None]) == judged(monkeypatch, [0.0, 0.0]) == "accuracy"
    assert judged(monkeypatch, [0.13, 0.91]) == judged(monkeypatch, [1.0, 2.0]) == "reward/mean"
    assert judged(monkeypatch, [0.01, 1.0], "reasoning_gym_answer") == "accuracy"  # which says what is right
    assert judged(monkeypatch, [1.0, 0.0], "length", options={"target": 8}) == "reward/mean"
    monkeypatch.setattr(digits, "judges_correct", True, raising=False)
    recipe = recipe_of("model", rewards=[{"function": f"{__file__}:digits", "name": "r"}])
    assert load_rewards(recipe.rewards)[0].judges_correct is True


def test_every_shipped_reward_is_known_to_tell_right_from_wrong_or_a_degree():
    """A new one has to be put on either side, since the headline follows from it."""
    right = {"arithmetic_answer", "gsm8k_answer", "reasoning_gym_answer", "think_format", "exact_match", "contains"}
    right |= {"regex", "json_valid", "tags", "numbers", "code_tests"}
    assert not right & GRADED and right | GRADED == set(SHIPPED)


def test_a_trainer_of_trl_s_learns_the_same_with_evaluations(model_folder, tmp_path):
    """It keeps metrics of its own between passes, of training and of evaluation."""
    data = {"eval": str(write_rows(tmp_path, LABELLED[:2], "eval.jsonl")), "eval_size": 2, "label": "label"}
    data |= {"prompt": "prompt", "chat": False, "train": str(write_rows(tmp_path, LABELLED))}
    runs = []
    for every in (None, 1):
        changes = {"data": data, "training": {"prompts_per_step": 4}, "evaluation": {"steps": every}}
        trained = loop_of(trl_recipe(model_folder, "trl/kto", tmp_path / "rows.jsonl", **changes), tmp_path)
        train(trained)
        runs.append(trained.run)
    assert_same(*runs)
    plain, found = (run.evaluation() for run in runs)
    assert measures(found["after"]) == measures(plain["after"]) == measures(found["during"][-1])
    assert {row["headline"] for row in (found["before"], *found["during"])} == {"logps/accuracy"}
    assert found["after"]["intervals"]["logps/accuracy"] == list(wilson(found["after"]["logps/accuracy"], 1))
