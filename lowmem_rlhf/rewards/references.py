"""Whether the shipped answer rewards can read the reference answers of the data, looked at before anything is trained.

A reward that reads none of them would give None for every completion. Functions of a user's own are not looked at: what
they read is seen in the first step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.data.sources import SplitRows
from lowmem_rlhf.data.values import is_missing, numbered, text_of, value_at
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import DataConfig
from lowmem_rlhf.recipe.tasks import of_task
from lowmem_rlhf.rewards.functions import (
    arithmetic_answer,
    gsm8k_answer,
    gsm8k_value,
    reads_problem,
    reasoning_gym_answer,
    reference_text,
)
from lowmem_rlhf.rewards.loading import Reward, check_reward_columns, rewards_by_task
from lowmem_rlhf.rewards.shipped import SHIPPED

_SHOWN = 60  # characters of a reference answer in a message
_NUMBERS = (
    "it compares numbers and short LaTeX: name the column of such answers in data.answer, or take a reward that "
    "compares texts (similarity, or a function of your own)"
)


@dataclass(frozen=True)
class _Reader:
    """How a reward reads a row's reference.

    Attributes:
        column: of the reference; ``answer`` is the one that `data.answer` names.
        reads: whether it reads a row, given the row and its reference.
        remedy: what to do where it does not.
    """

    column: str
    reads: Callable[[Mapping[str, Any], Any], bool]
    remedy: str


def check_references(
    rewards: Sequence[Reward], rows: Iterable[Mapping[str, Any]], data: DataConfig, noun: str = "reference answers"
) -> list[str]:
    """Check that every shipped answer reward reads at least one reference answer.

    Empty and missing answers do not count: a reward does not apply to their rows, which may be meant.

    Args:
        rows: of the data, before prompts are made of them.
        noun: what the answers are called in messages.

    Returns:
        For each reward that does not read all of them a sentence with how many it reads, and the first that it does
        not.

    Raises:
        UserError: a reward reads none; or reasoning-gym is needed and not installed.
    """
    known = numbered(rows)
    notes = []
    for reward in rewards:
        reader = _reader(reward)
        if reader is None or not known:
            continue
        column = data.answer if reader.column == "answer" and data.answer is not None else reader.column
        values = [(row, value_at(row, column)) for row in known]
        references = [(row, value) for row, value in values if not _is_empty(value)]
        if not references:
            raise UserError(
                f"rewards: {reward.name} has no reference answer to read: column {column!r} is empty in all "
                f"{len(known)} rows; name another column in data.answer, or leave the reward out"
            )
        lost = [(row, value) for row, value in references if not reader.reads(row, value)]
        if not lost:
            continue
        row, value = lost[0]
        first = f"first, row {row.number}: {_shown(value)}"
        if len(lost) == len(references):
            raise UserError(
                f"rewards: {reward.name} reads none of the {len(references)} {noun} ({first}); {reader.remedy}"
            )
        notes.append(
            f"rewards: {reward.name} reads {len(references) - len(lost)} of the {len(references)} {noun} and does not "
            f"apply to the others ({first})"
        )
    return notes


def check_run_references(
    rewards: Sequence[Reward],
    recipe: Recipe,
    rows: Iterable[Mapping[str, Any]],
    held_out: Iterable[Mapping[str, Any]] = (),
) -> list[str]:
    """Check the reference answers of the rows whose completions a recipe's rewards judge, as `check_references` does.

    Args:
        rows: trained on; judged only where training samples.
        held_out: judged always.
    """
    notes = check_references(rewards, rows, recipe.data) if recipe.spec.samples else []
    return notes + check_references(rewards, held_out, recipe.data, "held-out reference answers")


def check_rows(rewards: Sequence[Reward], recipe: Recipe, rows: Mapping[str, SplitRows]) -> list[str]:
    """Check that the rows of each task have what its rewards read.

    Args:
        rewards: of the recipe.
        rows: by task; where nothing is trained on, those that are held out have the columns.

    Returns:
        What is to be said of them (see `check_references`).

    Raises:
        UserError: see `check_reward_columns` and `check_references`.
    """
    notes: list[str] = []
    for task, own_rewards in rewards_by_task(recipe, rewards).items():
        if not own_rewards or task not in rows:
            continue
        own, own_rows = recipe.by_task[task], rows[task]
        answer = ["answer"] if own.data.answer is not None else []
        with of_task(task):
            columns = dict.fromkeys(n for row in own_rows.train or own_rows.held_out for n in [*row, *answer])
            check_reward_columns(own_rewards, columns)
            said = check_run_references(own_rewards, own, own_rows.train, own_rows.held_out)
        notes += [f"task {task}: {note}" if task else note for note in said]
    return notes


def _reader(reward: Reward) -> _Reader | None:
    if reward.function is SHIPPED[arithmetic_answer.__name__]:
        return _Reader("answer", lambda row, value: reference_text(value) is not None, _NUMBERS)
    if reward.function is SHIPPED[gsm8k_answer.__name__]:
        return _Reader("answer", lambda row, value: gsm8k_value(value) is not None, _NUMBERS)
    if reward.function is SHIPPED[reasoning_gym_answer.__name__]:
        remedy = "it reads the columns task, task_options and entry of data.train: reasoning_gym/TASK"
        return _Reader("entry", lambda row, value: _reads_problem(row), remedy)
    reads: Callable[[Any], bool] | None = getattr(reward.function, "reads", None)
    if reward.columns:  # where it does not say what it reads, as of similarity, any text can be compared
        remedy = getattr(reward.function, "remedy", "")
        return _Reader(reward.columns[0], lambda row, value: reads is None or reads(value), remedy)
    return None


def _reads_problem(row: Mapping[str, Any]) -> bool:
    return reads_problem(row.get("task"), row.get("task_options"), row.get("entry"))


def _is_empty(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else text_of(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
