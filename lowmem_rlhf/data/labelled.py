"""Examples for TRL's trainers: preference pairs, and answers with a label. No torch here.

Pairs are those that a reward model learns from (`build_pairs`): nothing is cut off, and a prompt is token for token
the one that rollouts, SFT and chat know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.data.bad_rows import RowError, RowReport
from lowmem_rlhf.data.columns import cell
from lowmem_rlhf.data.supervised import Pair, Rows, build_pairs, supervised_rows
from lowmem_rlhf.data.values import Row, text_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import DataConfig


@dataclass(frozen=True)
class Answer:
    """A prompt with one answer, and whether it is a good one."""

    prompt_ids: list[int]
    completion_ids: list[int]
    good: bool


Example = Pair | Answer


def read_answers(
    rows: Rows, recipe: Recipe, tokenizer: Any, stop_ids: frozenset[int], report: RowReport | None = None
) -> list[Answer]:
    """Return answers with their labels; of pairs each makes two.

    Raises:
        UserError: those of `build_pairs`; of labelled answers those of `build_supervised`, or a label that is neither
            true nor false.
    """
    report = report or RowReport(recipe.data)
    ((key, length),) = recipe.spec.lengths(recipe).items()
    if recipe.data.label is not None:
        return _labelled(rows, recipe.data, length, key, tokenizer, stop_ids, report)
    pairs = build_pairs(rows, recipe.data, length, tokenizer, stop_ids, key, report)
    good = [Answer(pair.prompt_ids, pair.chosen_ids, True) for pair in pairs]
    return good + [Answer(pair.prompt_ids, pair.rejected_ids, False) for pair in pairs]


def check_both_kinds(examples: Sequence[Any]) -> None:
    """Check that labelled answers to learn from are not all good or all bad.

    Raises:
        UserError: they are.
    """
    kinds = {one.good for one in examples if isinstance(one, Answer)}
    if len(kinds) == 1:
        raise UserError(
            f"data.label: all {len(examples)} answers are {'good' if kinds.pop() else 'bad'} ones; KTO learns from both"
        )


def _labelled(
    rows: Rows, data: DataConfig, length: int, key: str, tokenizer: Any, stop_ids: frozenset[int], report: RowReport
) -> list[Answer]:
    column = str(data.label)
    made = supervised_rows(
        rows, data, SFTSettings(), tokenizer, stop_ids, report, check=lambda row: _label(row, column)
    )
    kept: list[Answer] = []
    for row, one in made:
        tokens = len(one.prompt_ids) + len(one.completion_ids)
        if report.fits(row.number, tokens, length, key, "example"):
            kept.append(Answer(one.prompt_ids, one.completion_ids, _label(row, column)))
    report.finish(len(kept))
    return kept


def _label(row: Row, column: str) -> bool:
    """Return whether a row's answer is a good one; in a CSV file the label is a text."""
    value = cell(row, column, "data.label")
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (found := known.get(text_of(value).strip().lower())) is None:
        raise RowError("no label", f"column {column!r} must hold true or false (or 1 or 0); got {value!r}")
    return found
