"""From a run or a model to an outcome: opened, measured, estimated. The command line calls this."""

import datetime
import gc
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowmem_rlhf import __version__
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.evaluation.intervals import METHOD, Estimate, differences, estimates
from lowmem_rlhf.evaluation.measure import Measured, measure
from lowmem_rlhf.evaluation.subject import Subject, open_model_subject, open_run_subject
from lowmem_rlhf.model.roles import REFERENCE
from lowmem_rlhf.recipe import Recipe
from lowmem_rlhf.run import RunDirectory
from lowmem_rlhf.run_start import as_written


def evaluate_run(
    run: RunDirectory,
    overrides: list[str],
    step: int | None = None,
    device: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Return the outcome (see `kept`) of a run's policy beside its reference, from one base.

    Args:
        overrides, step, device: as `open_run_subject`'s.
        tasks, limit, chat: of lm-eval, in place of the held-out data; see `run_tasks`.

    Raises:
        UserError, RunError: as `open_run_subject` and `measure`.
    """
    if tasks:
        check_harness()
    subject = open_run_subject(run, overrides, step, device, judged=not tasks)
    if tasks:
        return _task_outcome(subject, tasks, limit, chat)
    recipe = as_written(subject.recipe, run.recipe(), run.path)
    return outcome(recipe, measure(subject), subject.steps)


def evaluate_models(models: Sequence[str], recipe: Recipe, given: list[str], device: str | None) -> dict[str, Any]:
    """Return the outcome of one model, or of two, the second less the first; one at a time is in memory.

    Args:
        models: as in a recipe.
        recipe: with the held-out data and the rewards.
        given: the overrides that are in it.

    Raises:
        UserError, RunError: as `open_model_subject` and `measure`; or the two were left different problems.
    """
    if not recipe.rewards and recipe.algorithm != "sft":
        raise UserError(f"--recipe {recipe.name}: it has no rewards to judge a model's answers with")
    found: list[Measured] = []
    for name, model in zip(_names(models), models, strict=True):
        found = _joined(found, _measured(name, model, recipe, given, device))
        gc.collect()
    return outcome(recipe, found)


def evaluate_model_tasks(
    model: str,
    recipe: Recipe,
    given: list[str],
    device: str | None,
    tasks: Sequence[str],
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Return the outcome of a model on lm-eval's tasks; of the recipe only ``hardware`` is read.

    Raises:
        UserError, RunError: as `open_model_subject` and `run_tasks`; or lm-eval is not installed.
    """
    check_harness()
    subject = open_model_subject(model, recipe, given, device, judged=False)
    return _task_outcome(replace(subject, roles={_names([model])[0]: REFERENCE}), tasks, limit, chat)


def check_harness() -> None:
    """Check that lm-eval is there.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval: EleutherAI's lm-eval is not installed; `pip install lm-eval`, or leave it out")


def _task_outcome(subject: Subject, tasks: Sequence[str], limit: int | None, chat: bool) -> dict[str, Any]:
    from lowmem_rlhf.evaluation.harness import run_tasks

    found = run_tasks(subject, tasks, limit, chat)
    how = {"data": "lm-eval", "tasks": list(tasks), "chat": chat}
    return {**_about(subject.recipe, subject.steps), **how, **found, "method": METHOD}


def _measured(name: str, model: str, recipe: Recipe, given: list[str], device: str | None) -> list[Measured]:
    """Measure one model; it is gone from memory when this returns."""
    subject = open_model_subject(model, recipe, given, device)
    return measure(replace(subject, roles={name: REFERENCE}))


def _joined(first: list[Measured], second: list[Measured]) -> list[Measured]:
    """Return what two models did, under the kinds of result that both have."""
    if not first:
        return second
    for one, two in zip(first, second, strict=True):
        if one.problems != two.problems:
            raise UserError(
                f"the models were left {one.problems} and {two.problems} {one.noun}s, as their tokenizers count "
                "differently; set data.long_prompts=error with a higher limit, or evaluate them one by one"
            )
    return [replace(one, columns={**one.columns, **two.columns}) for one, two in zip(first, second, strict=True)]


def _names(models: Sequence[str]) -> list[str]:
    """Return a short name for each model, the whole one where short ones are the same."""
    short = [model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] for model in models]
    return short if len(set(short)) == len(short) else list(models)


def outcome(recipe: Recipe, found: Sequence[Measured], steps: int | None = None) -> dict[str, Any]:
    """Return estimates of all that was measured, and by how much the second of two subjects is above the first."""
    results: dict[str, Any] = {}
    difference: dict[str, Any] = {}
    for part in found:
        for name, columns in part.columns.items():
            told = {key: one.to_dict() for key, one in _with_perplexity(estimates(columns)).items()}
            results[name] = {**results.get(name, {}), **told}
        if len(part.columns) == 2:
            first, second = part.columns.values()
            difference |= {key: one.to_dict() for key, one in differences(first, second).items()}
    temperature = recipe.evaluation.temperature
    answers = {
        "samples": recipe.evaluation.num_samples,
        "temperature": recipe.generation.temperature if temperature is None else temperature,
        "max_completion_length": recipe.generation.max_completion_length,
    }
    return {
        **_about(recipe, steps),
        "data": recipe.data.eval or recipe.data.train,
        **(answers if recipe.rewards else {}),
        "counts": {part.noun: part.problems for part in found},
        "results": results,
        **({"difference": difference} if difference else {}),
        "method": METHOD,
    }


def _about(recipe: Recipe, steps: int | None) -> dict[str, Any]:
    return {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "algorithm": recipe.algorithm,
        "steps": steps,
        "seed": recipe.training.seed,
    }


def _with_perplexity(found: dict[str, Estimate]) -> dict[str, Estimate]:
    """Return the estimates with the exponential of the loss and of its interval."""
    if (loss := found.get("loss")) is None:
        return found
    value, low, high = (None if x is None else math.exp(min(x, 700.0)) for x in (loss.value, loss.low, loss.high))
    assert value is not None
    return {"loss": loss, "perplexity": Estimate(value, low, high), **found}
