"""The held-out problems of an evaluation: never one that the run has trained on. No torch here."""

import logging
import random
import re
from collections.abc import Sequence
from typing import Any

from lowmem_rlhf.data.provenance import rows_differ
from lowmem_rlhf.data.sources import has_splits, load_rows
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.field_roles import keys_with
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import DataConfig

logger = logging.getLogger(__name__)

# What of a run's recipe an evaluation may change: how and on what it is measured, never what was learned.
MAY_CHANGE = keys_with(Recipe, may_change_in_evaluation=True)


def check_overrides(overrides: list[str]) -> None:
    """Check that overrides of a run's recipe leave alone what was learned.

    Raises:
        UserError: one does not.
    """
    for override in overrides:
        key = re.sub(r"^tasks\[\d+\]\.", "", override.partition("=")[0].strip())  # of one of several tasks
        key = "evaluation.accuracy" if key == "accuracy" else key
        section = key.partition("[")[0].partition(".")[0]
        if not {key, f"{section}.*", section}.intersection(MAY_CHANGE):
            raise UserError(f"override {override!r}: an evaluation of a run may change {', '.join(MAY_CHANGE)}")


def held_out_rows(trained: Recipe | None, wanted: Recipe, fingerprint: Any = None, named: bool = False) -> list[Row]:
    """Return the rows to evaluate on.

    Args:
        trained: the recipe that the run was trained with; None: nothing was trained.
        wanted: the same with the changes of this evaluation.
        fingerprint: what the run's inputs.json says of its held-out rows, where it does.
        named: this evaluation names its own held-out data.

    Raises:
        UserError: there are none, or they would be rows that were trained on, or may have been.
    """
    seed = wanted.training.seed
    size = wanted.data.eval_size
    if size == 0:
        raise UserError(
            "data.eval_size: the recipe holds nothing out (0); give held-out data with data.eval=FILE and "
            "data.eval_size=N"
        )
    if trained is None:
        return load_rows(wanted.data, "eval", seed)
    if _apart(wanted.data):
        rows = load_rows(wanted.data, "eval", seed)
        if named:
            _warn_of_other_rows(fingerprint, rows, wanted.data)
        else:
            same = trained.data.eval_size == size
            _check_same_rows(fingerprint, rows if same else load_rows(trained.data, "eval", seed), trained)
        return rows
    if _apart(trained.data):
        raise UserError(
            f"data.eval: got {wanted.data.eval!r}, but the run trained on all of {trained.data.train}; leave "
            f"data.eval out ({trained.data.eval}) or give other data"
        )
    rows = load_rows(trained.data, "eval", seed)
    _check_same_rows(fingerprint, rows, trained)
    if size > len(rows):
        raise UserError(
            f"data.eval_size: got {size}, but the run held {len(rows)} problems out of {trained.data.train} and "
            "trained on the others; take at most that many, or give other data with data.eval=FILE"
        )
    if size == len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(f"take/{seed}").sample(range(len(rows)), size))]


def _check_same_rows(fingerprint: Any, rows: Sequence[dict[str, Any]], trained: Recipe) -> None:
    """Check that the settings of the run give the rows that it held out.

    Raises:
        UserError: they give others.
    """
    if difference := rows_differ(fingerprint, rows):
        source = trained.data.eval or trained.data.train
        raise UserError(
            f"the held-out rows of {source} are not those that the run held out ({difference}), so they may have been "
            "trained on; restore the data, or name held-out data with data.eval=FILE"
        )


def _warn_of_other_rows(fingerprint: Any, rows: Sequence[dict[str, Any]], data: DataConfig) -> None:
    if difference := rows_differ(fingerprint, rows):
        logger.warning(f"the held-out rows of {data.eval} are not those that the run held out ({difference})")


def _apart(data: DataConfig) -> bool:
    """Whether the held-out rows come from a source or split of their own, and not out of the training data."""
    if data.eval not in (None, data.train):
        return True
    return has_splits(data.train) and data.eval_split != data.train_split
