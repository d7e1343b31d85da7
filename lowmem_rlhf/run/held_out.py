"""What the held-out evaluations of a run say: the measure that counts, the best of them, what metrics get. No torch.

evaluation.json holds ``before`` and ``after``, each with measures by name, ``intervals`` (``[low, high]`` of those that
have one) and ``headline``, the name of the measure that the task has. With `evaluation.steps` it holds ``during`` as
well, a list of such rows with their ``step`` (``before`` and ``after`` then have one, too); with `evaluation.keep_best`
``best``: its ``step``, the headline as ``metric`` and its ``value``; and ``stopped``, a sentence, where
`evaluation.patience` ended the run.
"""

import math
from collections.abc import Iterable
from typing import Any

ACCURACY, MEAN_REWARD, LOSS = "accuracy", "reward/mean", "loss"
BEFORE, DURING, AFTER, BEST, STOPPED = "before", "during", "after", "best", "stopped"
PREFIX = "eval/"  # of what metrics get of an evaluation
COUNTS = ("problems", "samples", "temperature", "step")  # numbers of a row that measure nothing

Row = dict[str, Any]


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else (a missing measure, null, text)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def measures(row: Row) -> dict[str, float]:
    """Return what a row measured, without its counts."""
    return {name: got for name, value in row.items() if name not in COUNTS and (got := number(value)) is not None}


def part(evaluation: dict[str, Any], name: str) -> Row:
    """Return what stands under a name: ``before``, ``after``, ``best``; empty where nothing does."""
    found = evaluation.get(name)
    return found if isinstance(found, dict) else {}


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


def metrics_of(row: Row) -> dict[str, Any]:
    """Return what a step's metrics get of its evaluation: ``eval/NAME``, and the headline's name."""
    named = {f"{PREFIX}headline": row["headline"]} if "headline" in row else {}
    return {**named, **{f"{PREFIX}{name}": value for name, value in measures(row).items()}}


def with_evaluations(metrics: Iterable[Row], evaluation: dict[str, Any]) -> list[Row]:
    """Return the metrics, those of a step after which there was an evaluation with what it measured."""
    found = {row["step"]: metrics_of(row) for row in during(evaluation)}
    return [{**row, **found.get(row.get("step"), {})} for row in metrics]
