"""Rows of token ids for TRL's collators, from the pairs and labelled answers that a recipe's data holds.

Pairs are those that a reward model learns from (`build_pairs`): nothing is cut off, and a prompt is token for token
the one that rollouts, SFT and chat know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError, RowReport
from lowmem_rlhf.data.prompts import cell
from lowmem_rlhf.data.supervised import Pair, Rows, build_pairs, supervised_rows
from lowmem_rlhf.data.values import Row, text_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe import DataConfig, Recipe, SFTSettings
from lowmem_rlhf.recipe_trl import TRL_TRAINERS, TRLTrainer, max_length
from lowmem_rlhf.training.trl_model import IGNORED

LENGTH = "trl.max_length"


@dataclass(frozen=True)
class Answer:
    """A prompt with one answer, and whether it is a good one."""

    prompt_ids: list[int]
    completion_ids: list[int]
    good: bool


Example = Pair | Answer


def read_examples(
    rows: Rows, recipe: Recipe, tokenizer: Any, stop_ids: frozenset[int], report: RowReport | None = None
) -> list[Example]:
    """Return what a recipe's trainer learns from: pairs, or for KTO labelled answers, of which a pair makes two.

    Raises:
        UserError: those of `build_pairs`; of labelled answers those of `build_supervised`, or a label that is neither
            true nor false.
    """
    length, report = max_length(recipe.trl), report or RowReport(recipe.data)
    if recipe.data.label is not None:
        return _labelled(rows, recipe.data, length, tokenizer, stop_ids, report)
    pairs = build_pairs(rows, recipe.data, length, tokenizer, stop_ids, LENGTH, report)
    if not TRL_TRAINERS[recipe.algorithm].labelled:
        return list(pairs)
    good: list[Example] = [Answer(pair.prompt_ids, pair.chosen_ids, True) for pair in pairs]
    return good + [Answer(pair.prompt_ids, pair.rejected_ids, False) for pair in pairs]


def _labelled(
    rows: Rows, data: DataConfig, length: int, tokenizer: Any, stop_ids: frozenset[int], report: RowReport
) -> list[Example]:
    column = str(data.label)
    made = supervised_rows(
        rows, data, SFTSettings(), tokenizer, stop_ids, report, check=lambda row: _label(row, column)
    )
    kept: list[Example] = []
    for row, one in made:
        tokens = len(one.prompt_ids) + len(one.completion_ids)
        if report.fits(row.number, tokens, length, LENGTH, "example"):
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


def check_both_kinds(examples: Sequence[Example]) -> None:
    """Check that labelled answers to learn from are not all good or all bad.

    Raises:
        UserError: they are.
    """
    kinds = {one.good for one in examples if isinstance(one, Answer)}
    if len(kinds) == 1:
        raise UserError(
            f"data.label: all {len(examples)} answers are {'good' if kinds.pop() else 'bad'} ones; KTO learns from both"
        )


def pairs_among(examples: Sequence[Example]) -> list[Pair]:
    """Return the pairs among examples; a good and a bad answer to the same prompt are one as well."""
    bad = {tuple(one.prompt_ids): one for one in examples if isinstance(one, Answer) and not one.good}
    found: list[Pair] = []
    for one in examples:
        if isinstance(one, Pair):
            found.append(one)
        elif one.good and (other := bad.get(tuple(one.prompt_ids))) is not None:
            found.append(Pair(one.prompt_ids, one.completion_ids, other.completion_ids, 0.0))
    return found


def tokens_of(example: Example) -> tuple[int, int, int]:
    """Return the tokens of an example's prompt and answers when the prompt is fed once, its rows, and the longest."""
    prompt = len(example.prompt_ids)
    if isinstance(example, Answer):
        return prompt + len(example.completion_ids), 1, prompt + len(example.completion_ids)
    answers = [len(example.chosen_ids), len(example.rejected_ids)]
    return prompt + sum(answers), 2, prompt + max(answers)


def answer_tokens(example: Example) -> int:
    """Return the tokens of an example that are answers'."""
    return tokens_of(example)[0] - len(example.prompt_ids)


def batch_rows(examples: Sequence[Example], kind: TRLTrainer) -> list[dict[str, Any]]:
    """Return the examples of a step as rows for the trainer's collator.

    For KTO, which estimates a KL from answers to other prompts, each row also has the answer of the one before it: so
    these are the step's own answers, as its paper wants it.
    """
    found = []
    for number, one in enumerate(examples):
        if isinstance(one, Answer):
            before = examples[number - 1]
            assert isinstance(before, Answer)
            row = {"prompt_ids": one.prompt_ids, "completion_ids": one.completion_ids, "label": one.good}
            found.append({**row, "KL_completion_ids": before.completion_ids})
        elif kind.full_logits:
            found.append({**_sequence("chosen", one, one.chosen_ids), **_sequence("rejected", one, one.rejected_ids)})
        else:
            row = {"prompt_ids": one.prompt_ids, "chosen_ids": one.chosen_ids, "rejected_ids": one.rejected_ids}
            found.append(row)
    return found


def _sequence(name: str, pair: Pair, answer: list[int]) -> dict[str, list[int]]:
    """Return a prompt with an answer as TRL's older collator has it: whole, with labels where the answer is."""
    ids = pair.prompt_ids + answer
    labels = [IGNORED] * len(pair.prompt_ids) + answer
    return {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}
