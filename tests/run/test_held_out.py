"""What is read out of the held-out evaluations of a run: the headline, the best, when it no longer rises."""

import json

import pytest

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.sections import EvaluationConfig
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import (
    best_of,
    headline,
    is_greater_better,
    metrics_of,
    no_better_than_before,
    rows_of,
    taken_back,
    with_evaluations,
    without_gain,
)

VALUES = {"name": "t", "model": "m", "data": {"train": "arithmetic"}, "rewards": ["arithmetic_answer"]}


def evaluation(*values, name="accuracy", **more):
    """Return results that were measured after steps 10, 20, ..."""
    rows = [{"step": 10 * number, name: value, "headline": name} for number, value in enumerate(values, 1)]
    return {"before": {"step": 0, name: 0.25, "headline": name}, "during": rows, **more}


def wanted(**values):
    return EvaluationConfig(steps=10, **values)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"before": {"accuracy": 0.1, "headline": "accuracy"}}, "accuracy"),
        ({"before": {"headline": "accuracy"}, "during": [{"step": 1, "headline": "reward/mean"}]}, "reward/mean"),
        ({"before": {"headline": "reward/mean"}, "after": {"headline": "accuracy"}}, "reward/mean"),
        ({"after": {"loss": 2.0, "accuracy": None, "headline": "loss"}}, "loss"),
        # what older versions wrote: a probability below 1, a task, a task at which all fail, SFT, others
        ({"before": {"accuracy": 0.0, "reward/mean": 0.1}, "after": {"reward/mean": 0.9}}, "reward/mean"),
        ({"before": {"accuracy": 0.0, "reward/mean": 0.0}, "after": {"accuracy": 0.8, "reward/mean": 0.9}}, "accuracy"),
        ({"before": {"accuracy": 0.0, "reward/mean": 0.0}}, "accuracy"),
        ({"before": {"accuracy": None, "loss": 1.0, "perplexity": 2.7}, "after": None}, "loss"),
        ({"after": {"margin": 1.0, "problems": 4}}, "margin"),
        ({}, "accuracy"),
    ],
)  # fmt: skip
def test_the_headline_is_a_measure_that_the_task_has(found, name):
    assert headline(found) == name


def test_the_best_is_the_first_of_the_greatest_or_the_least_and_never_that_before_training():
    assert best_of(evaluation(0.1, 0.2, 0.2, None), wanted()) == {"step": 20, "metric": "accuracy", "value": 0.2}
    losses = evaluation(2.0, 1.5, 1.7, name="loss")
    assert best_of(losses, wanted()) == {"step": 20, "metric": "loss", "value": 1.5}
    assert best_of(losses, wanted(greater_is_better=True))["step"] == 10
    assert best_of(evaluation(after={"step": 25, "accuracy": 0.9}), wanted())["step"] == 25
    assert best_of({"before": {"accuracy": 1.0}}, wanted()) is None
    for values, worse in (((0.1, 0.2), True), ((0.25,), True), ((0.3,), False)):
        found = evaluation(*values)
        assert no_better_than_before(found, best_of(found, wanted()), wanted()) is worse


def test_names_of_losses_and_cut_answers_are_better_where_they_are_less():
    less = ("loss", "eval_loss", "perplexity", "completion/truncated", "nll_loss")
    assert not any(is_greater_better(name, wanted()) for name in less)
    assert all(is_greater_better(name, wanted()) for name in ("accuracy", "reward/mean", "score/margin"))


@pytest.mark.parametrize(
    ("values", "min_delta", "count"),
    [
        ((), 0, 0),
        ((0.5,), 0, 0),
        ((0.5, 0.5, 0.4), 0, 2),
        ((0.5, 0.4, 0.6), 0, 0),
        ((0.5, 0.55, 0.59, 0.61), 0.1, 0),  # small gains add up
        ((0.5, 0.55, 0.59), 0.1, 2),
        ((None, 0.2, None), 0, 1),
    ],
)
def test_evaluations_without_a_gain_are_counted(values, min_delta, count):
    assert without_gain(evaluation(*values), wanted(patience=1, min_delta=min_delta)) == count
    turned = [None if value is None else -value for value in values]
    assert without_gain(evaluation(*turned, name="loss"), wanted(patience=1, min_delta=min_delta)) == count


def test_a_resume_keeps_the_rows_up_to_its_step_and_the_best_of_them():
    whole = evaluation(0.1, 0.3, 0.2, after={"step": 30}, best={"step": 20}, stopped="...")
    back = taken_back(whole, 15, False, wanted(keep_best=True))
    assert [row["step"] for row in rows_of(back)] == [0, 10] and back["best"]["step"] == 10
    assert {"after", "stopped"}.isdisjoint(back)
    ended = taken_back(whole, 30, True, wanted())
    assert ended["after"] and ended["stopped"] and "best" not in ended and len(ended["during"]) == 3
    assert taken_back({"before": {}, "after": {}}, 5, False, EvaluationConfig()) == {"before": {}}


def test_metrics_of_a_step_have_its_evaluation_and_a_damaged_file_hides_nothing_else(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (9, 10):
        run.log_metrics({"step": step, "loss": 1.0})
    row = {"step": 10, "accuracy": 0.5, "loss": None, "problems": 8, "headline": "accuracy", "intervals": {}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"during": [row, "?", {"step": None}]}))
    assert metrics_of(row) == {"eval/headline": "accuracy", "eval/accuracy": 0.5}
    assert run.metrics() == [{"step": 9, "loss": 1.0}, {"step": 10, "loss": 1.0, **metrics_of(row)}]
    assert with_evaluations(run.metrics(), {"during": "?"}) == run.metrics()
    (tmp_path / "evaluation.json").write_text("{")
    assert [len(row) for row in run.metrics()] == [2, 2] and run.best_step() is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation": {"steps": 5}, "data": {"eval_size": 0}}, "evaluation.steps: got 5, but nothing is held out"),
        ({"evaluation": {"keep_best": True}}, "evaluation.keep_best: is for evaluations while the run goes on"),
        ({"evaluation": {"patience": 2}}, "evaluation.patience: .* set evaluation.steps=N, or leave"),
        ({"evaluation": {"steps": 5, "min_delta": 0.1}}, "evaluation.min_delta: is for evaluation.patience"),
        ({"evaluation": {"metric": "reward/maen"}}, "got 'reward/maen'; .*did you mean 'reward/mean'"),
        ({"evaluation": {"steps": 0}}, "evaluation.steps: got 0; it should be at least 1"),
        (
            {"algorithm": "sft", "evaluation": {"steps": 5}, "sft": {"eval_steps": 5}},
            "sft.eval_steps, evaluation.steps: got both; .* leave sft.eval_steps out",
        ),
        (
            {"algorithm": "classifier", "rewards": [], "evaluation": {"steps": 5, "keep_best": True}}
            | {"data": {"text": "t", "label": "l"}},
            "evaluation.keep_best: a classifier's run keeps no checkpoints; leave it out",
        ),
        ({"training": {"load_best_model_at_end": True}}, "did you mean 'evaluation.keep_best'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_sentence(changes, words):
    values = {**VALUES, **changes, "data": {**VALUES["data"], **changes.get("data", {})}}
    with pytest.raises(UserError, match=words) as caught:
        validate_recipe(values)
    assert len(str(caught.value).splitlines()) == 2  # whose recipe it is, and the sentence
