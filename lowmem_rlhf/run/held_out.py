"""What the held-out evaluations of a run say: the measure that counts, the best of them, what metrics get. No torch.

evaluation.json holds ``before`` and ``after``, each with measures by name, ``intervals`` (``[low, high]`` of those that
have one) and ``headline``, the name of the measure that the task has; of a run with several, ``tasks`` has the same of
each. With `evaluation.steps` it holds ``during`` as well, a list of such rows with their ``step`` (``before`` and
``after`` then have one, too); with `evaluation.keep_best`
``best``: its ``step``, the headline as ``metric`` and its ``value``; and ``stopped``, a sentence, where
`evaluation.patience` ended the run.
"""

import sys
from collections.abc import Iterable
from typing import Any

from lowmem_rlhf.recipe.sections import EvaluationConfig

ACCURACY, MEAN_REWARD, LOSS = "accuracy", "reward/mean", "loss"
BEFORE, DURING, AFTER, BEST, STOPPED = "before", "during", "after", "best", "stopped"
PREFIX = "eval/"  # of what metrics get of an evaluation
COUNTS = ("problems", "samples", "temperature", "step")  # numbers of a row that measure nothing
_LARGEST = sys.float_info.max  # NaN is not below it, nor an infinity or an int that no float can be
_SMALLER = ("loss", "perplexity", "truncated")  # last parts of names; or their ends

Row = dict[str, Any]


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else (a missing measure, null, text)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    return None


def measures(row: Row) -> dict[str, float]:
    """Return what a row measured, without its counts."""
    return {name: got for name, value in row.items() if name not in COUNTS and (got := number(value)) is not None}


def part(evaluation: dict[str, Any], name: str) -> Row:
    """Return what stands under a name: ``before``, ``after``, ``best``; empty where nothing does."""
    found = evaluation.get(name)
    return found if isinstance(found, dict) else {}


def with_tasks(row: Row) -> Row:
    """Return a row with the measures of each of its tasks, and their intervals, behind ``TASK: ``."""
    flat, intervals = dict(row), dict(part(row, "intervals"))
    for task, own in part(row, "tasks").items():
        flat |= {f"{task}: {name}": value for name, value in measures(own).items()}
        intervals |= {f"{task}: {name}": bounds for name, bounds in part(own, "intervals").items()}
    return {**flat, "intervals": intervals} if intervals else flat


def during(evaluation: dict[str, Any]) -> list[Row]:
    """Return the rows of evaluations while the run went on, each with its ``step``."""
    rows = evaluation.get(DURING)
    return [one for one in rows if isinstance(one, dict) and number(one.get("step"))] if isinstance(rows, list) else []


def rows_of(evaluation: dict[str, Any]) -> list[Row]:
    """Return the rows of all evaluations in their order."""
    return [row for row in (part(evaluation, BEFORE), *during(evaluation), part(evaluation, AFTER)) if row]


def headline(evaluation: dict[str, Any]) -> str:
    """Return the name of the measure that is shown first and compared.

    Where rows differ it is not the accuracy: a reward that has been seen between 0 and 1 is no matter of right or
    wrong. Of rows that name none (those of older versions), it is the accuracy unless nothing was ever right, the mean
    reward, or the loss.
    """
    rows = rows_of(evaluation)
    if named := [row["headline"] for row in rows if isinstance(row.get("headline"), str)]:
        return next((name for name in reversed(named) if name != ACCURACY), ACCURACY)
    found = [measures(row) for row in rows]
    for name in (ACCURACY, MEAN_REWARD):
        if any(row.get(name) for row in found):
            return name
    there = list(dict.fromkeys(name for row in found for name in row))
    return next((name for name in (ACCURACY, MEAN_REWARD, LOSS) if name in there), there[0] if there else ACCURACY)


def is_greater_better(name: str, wanted: EvaluationConfig) -> bool:
    """Whether a greater value of a measure is the better one, as the recipe says, or by its name."""
    if wanted.greater_is_better != "auto":
        return wanted.greater_is_better
    return not name.rpartition("/")[2].endswith(_SMALLER)


def best_of(evaluation: dict[str, Any], wanted: EvaluationConfig) -> dict[str, Any] | None:
    """Return step, metric and value of the best evaluation, the first of equals; None where there is none.

    That before training is none of them: nothing was learned by then, and there is no checkpoint of it.
    """
    name = headline(evaluation)
    best: dict[str, Any] | None = None
    for row in _with_steps(evaluation):
        value = number(row.get(name))
        if value is not None and (best is None or _gain(name, value, best["value"], wanted) > 0):
            best = {"step": int(row["step"]), "metric": name, "value": value}
    return best


def without_gain(evaluation: dict[str, Any], wanted: EvaluationConfig) -> int:
    """Return how many evaluations there were since one that exceeded those before by more than `evaluation.min_delta`.

    The first one counts as a gain; one without the measure counts as none.
    """
    name, reference, count = headline(evaluation), None, 0
    for row in during(evaluation):
        value = number(row.get(name))
        if value is not None and (reference is None or _gain(name, value, reference, wanted) > wanted.min_delta):
            reference, count = value, 0
        else:
            count += 1
    return count


def no_better_than_before(evaluation: dict[str, Any], best: dict[str, Any], wanted: EvaluationConfig) -> bool:
    """Whether what was measured before training is as good as the best evaluation."""
    before = number(part(evaluation, BEFORE).get(best["metric"]))
    return before is not None and _gain(best["metric"], best["value"], before, wanted) <= 0


def taken_back(evaluation: dict[str, Any], step: int, ended: bool, wanted: EvaluationConfig) -> dict[str, Any]:
    """Return what there was after a step.

    Args:
        ended: the run ended with it, so that ``after`` stays.
    """
    left = {key: value for key, value in evaluation.items() if ended or key not in (AFTER, STOPPED)}
    if DURING in left:
        left[DURING] = [row for row in during(evaluation) if row["step"] <= step]
    left.pop(BEST, None)
    if wanted.keep_best and (best := best_of(left, wanted)):
        left[BEST] = best
    return left


def metrics_of(row: Row) -> dict[str, Any]:
    """Return what a step's metrics get of its evaluation: ``eval/NAME``, and the headline's name."""
    named = {f"{PREFIX}headline": row["headline"]} if "headline" in row else {}
    return {**named, **{f"{PREFIX}{name}": value for name, value in measures(row).items()}}


def with_evaluations(metrics: Iterable[Row], evaluation: dict[str, Any]) -> list[Row]:
    """Return the metrics, those of a step after which there was an evaluation with what it measured."""
    found = {row["step"]: metrics_of(row) for row in during(evaluation)}
    return [{**row, **found.get(row.get("step"), {})} for row in metrics]


def _with_steps(evaluation: dict[str, Any]) -> list[Row]:
    after = part(evaluation, AFTER)
    return [*during(evaluation), *([after] if number(after.get("step")) else [])]


def _gain(name: str, value: float, than: float, wanted: EvaluationConfig) -> float:
    return value - than if is_greater_better(name, wanted) else than - value
