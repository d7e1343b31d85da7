"""From a run or a model to an outcome: open it, measure it, estimate intervals. The command line calls this."""

import datetime
import gc
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowmem_rlhf import __version__
from lowmem_rlhf.engine.roles import REFERENCE
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.evaluation.measure import Measured, measure_target, of_all_tasks
from lowmem_rlhf.evaluation.target import EvalTarget, open_model_target, open_run_target
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.start import as_written
from lowmem_rlhf.training.intervals import METHOD, Estimate, differences, estimates, perplexity


def evaluate_run(
    opened: OpenRun,
    overrides: list[str],
    device: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Return the outcome (see `run.evaluations`) of a run's policy beside its reference, from one base.

    Args:
        overrides, device: as `open_run_target`'s.
        tasks, limit, chat: of lm-eval, in place of the held-out data; see `run_tasks`.

    Raises:
        UserError, RunError: as `open_run_target` and `measure_target`.
    """
    if tasks:
        check_harness()
    target = open_run_target(opened, overrides, device, judged=not tasks)
    if tasks:
        return _task_outcome(target, tasks, limit, chat)
    recipe = as_written(target.recipe, opened.written, opened.directory.path)
    return outcome(recipe, measure_target(target), target.steps)


def evaluate_models(models: Sequence[str], recipe: Recipe, overrides: list[str], device: str | None) -> dict[str, Any]:
    """Return the outcome of one model, or of two with the second less the first; only one is in memory at a time.

    Args:
        models: as in a recipe.
        recipe: with the held-out data and the rewards.
        overrides: those that were applied to the recipe.

    Raises:
        UserError, RunError: as `open_model_target` and `measure_target`; or the two kept different problems.
    """
    if not recipe.rewards and recipe.spec.rows != "completions":
        raise UserError(f"--recipe {recipe.name}: it has no rewards to judge a model's answers with")
    measured: dict[str, list[Measured]] = {}
    for name, model in zip(_names(models), models, strict=True):
        new = _measured(name, model, recipe, overrides, device)
        measured = {task: _joined(measured.get(task, []), own) for task, own in new.items()}
        gc.collect()
    return outcome(recipe, measured)


def evaluate_model_tasks(
    model: str,
    recipe: Recipe,
    overrides: list[str],
    device: str | None,
    tasks: Sequence[str],
    limit: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Return the outcome of a model on lm-eval's tasks; of the recipe only ``hardware`` is read.

    Raises:
        UserError, RunError: as `open_model_target` and `run_tasks`; or lm-eval is not installed.
    """
    check_harness()
    target = open_model_target(model, recipe, overrides, device, judged=False)
    return _task_outcome(replace(target, roles={_names([model])[0]: REFERENCE}), tasks, limit, chat)


def check_harness() -> None:
    """Check that lm-eval is there.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval: EleutherAI's lm-eval is not installed; `pip install lm-eval`, or leave it out")


def _task_outcome(target: EvalTarget, tasks: Sequence[str], limit: int | None, chat: bool) -> dict[str, Any]:
    from lowmem_rlhf.evaluation.harness import run_tasks

    results = run_tasks(target, tasks, limit, chat)
    how = {"data": "lm-eval", "tasks": list(tasks), "chat": chat}
    return {**_about(target.recipe, target.steps), **how, **results, "method": METHOD}


def _measured(
    name: str, model: str, recipe: Recipe, overrides: list[str], device: str | None
) -> dict[str, list[Measured]]:
    """Measure one model; its memory is free again when this returns."""
    target = open_model_target(model, recipe, overrides, device)
    return measure_target(replace(target, roles={name: REFERENCE}))


def _joined(first: list[Measured], second: list[Measured]) -> list[Measured]:
    """Return the results of two models side by side, for each kind of result."""
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


def outcome(recipe: Recipe, measured: Mapping[str, list[Measured]], steps: int | None = None) -> dict[str, Any]:
    """Return an estimate of every quantity, and by how much the second of two targets exceeds the first.

    Args:
        recipe: of the run or the evaluation.
        measured: by task; several are told together and, under ``tasks``, each alone.
        steps: that the policy was trained for.
    """
    temperature = recipe.evaluation.temperature
    answers = {
        "samples": recipe.evaluation.num_samples,
        "temperature": recipe.generation.temperature if temperature is None else temperature,
        "max_completion_length": recipe.generation.max_completion_length,
        **recipe.generation.controls,
    }
    metric = recipe.evaluation.metric
    sources = {task: own.data.eval or own.data.train for task, own in recipe.by_task.items()}
    return {
        **_about(recipe, steps),
        "data": ", ".join(f"{source} ({task})" if task else source for task, source in sources.items()),
        **(answers if recipe.rewards else {}),
        **_estimated(of_all_tasks(measured)),
        **({"headline": metric} if metric != "auto" else {}),
        **({"tasks": {task: _estimated(own) for task, own in measured.items()}} if recipe.tasks else {}),
        "method": METHOD,
    }


def _estimated(measured: Sequence[Measured]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    difference: dict[str, Any] = {}
    for part in measured:
        for name, columns in part.columns.items():
            estimated = {key: one.to_dict() for key, one in _with_perplexity(estimates(columns)).items()}
            results[name] = {**results.get(name, {}), **estimated}
        if len(part.columns) == 2:
            first, second = part.columns.values()
            difference |= {key: one.to_dict() for key, one in differences(first, second).items()}
    return {
        "counts": {part.noun: part.problems for part in measured},
        "results": results,
        **({"difference": difference} if difference else {}),
        "headline": measured[-1].headline,
    }


def _about(recipe: Recipe, steps: int | None) -> dict[str, Any]:
    return {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "algorithm": recipe.algorithm,
        "steps": steps,
        "seed": recipe.training.seed,
    }


def _with_perplexity(estimated: dict[str, Estimate]) -> dict[str, Estimate]:
    """Return the estimates with the perplexity: the exponential of the loss and of its interval."""
    if (loss := estimated.get("loss")) is None:
        return estimated
    value, low, high = (None if x is None else perplexity(x) for x in (loss.value, loss.low, loss.high))
    assert value is not None
    return {"loss": loss, "perplexity": Estimate(value, low, high), **estimated}
