"""Few-shot prompts: solved examples that stand before each prompt, from a file or from a column of its row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.columns import cell
from lowmem_rlhf.data.messages import Message
from lowmem_rlhf.data.readers import read_file
from lowmem_rlhf.data.values import Row, is_missing, text_of, value_at
from lowmem_rlhf.recipe.sections import DataConfig

KEY = "data.few_shot"


@dataclass(frozen=True)
class Shot:
    """A solved example: what a user would ask, and the answer."""

    asked: str
    answer: str


def file_rows(data: DataConfig) -> list[Row]:
    """Return the examples' rows where a file holds them; empty where none does.

    Raises:
        UserError: it cannot be read.
    """
    few = data.few_shot
    if few is None or few.file is None:
        return []
    table = read_file(few.file, f"{KEY}.file")
    return table.rows(range(len(table) if few.count is None else min(few.count, len(table))))


def column_rows(row: Row, data: DataConfig) -> list[Row]:
    """Return the examples of a row where a column holds them; empty where none does.

    Raises:
        RowError: it holds something else.
    """
    few = data.few_shot
    if few is None or few.column is None:
        return []
    held = cell(row, few.column, f"{KEY}.column")
    if is_missing(held):
        return []
    if not isinstance(held, list) or not all(isinstance(one, dict) for one in held):
        raise RowError(
            "no examples",
            f"column {few.column!r} must hold the solved examples of its row, a list of objects with the columns of "
            f"the data; got {text_of(held)[:60]!r}",
        )
    return [Row(one, row.number) for one in held[: few.count]]


def answer_of(row: Row, data: DataConfig) -> str:
    """Return the answer of a solved example.

    Raises:
        RowError: it has none.
    """
    assert data.few_shot is not None
    column = data.few_shot.answer or data.completion or data.answer or "answer"
    value: Any = value_at(row, column)
    if not isinstance(value, str | int | float) or not text_of(value).strip():
        raise RowError(
            "an example without an answer",
            f"a solved example has no answer in column {column!r} (its columns: {', '.join(row)}); fill it, or name "
            f"another one in {KEY}.answer",
        )
    return text_of(value)


def before_text(shots: Sequence[Shot], text: str) -> str:
    """Return a plain prompt with solved examples before it, an empty line after each."""
    return "\n\n".join([*(_solved(shot) for shot in shots), text])


def _solved(shot: Shot) -> str:
    """Return an example as SFT writes a plain one: the answer behind a space that is there, or on a line of its own."""
    seam = "" if shot.asked[-1].isspace() or shot.answer[0].isspace() else "\n"
    return f"{shot.asked}{seam}{shot.answer}"


def before_messages(shots: Sequence[Shot], messages: Sequence[Message]) -> list[Message]:
    """Return a chat's messages with solved examples as turns before it, behind the system message."""
    system = [one for one in messages[:1] if one["role"] == "system"]
    turns: list[Message] = []
    for shot in shots:
        turns += [{"role": "user", "content": shot.asked}, {"role": "assistant", "content": shot.answer}]
    return [*system, *turns, *messages[len(system) :]]
