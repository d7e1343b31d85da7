"""Preference rows: a prompt with a better and a worse answer, in the shapes that data sets have. No torch here.

An answer is a text, a list of one assistant message, or a whole conversation (UltraFeedback-binarized and others); a
text may also hold a whole dialogue after ``Human:`` and ``Assistant:`` (Anthropic's hh-rlhf). Of whole conversations
the prompt is the beginning that both share.
"""

import math
import re
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.columns import cell, check_characters
from lowmem_rlhf.data.messages import Message
from lowmem_rlhf.data.prompt_writer import PromptWriter
from lowmem_rlhf.data.values import Row, has_column, is_missing, text_of, value_at

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def pair_of(row: Row, writer: PromptWriter) -> tuple[Any, Message, Message]:
    """Return what a pair's prompt is made of, and the better and the worse answer.

    Returns:
        The prompt as messages or a text, or None for the row's own prompt column; then the two answers.

    Raises:
        RowError: the row holds no pair.
    """
    data = writer.data
    columns = (str(data.chosen), str(data.rejected))
    values = [cell(row, column, f"data.{key}") for column, key in zip(columns, ("chosen", "rejected"), strict=True)]
    if all(isinstance(value, str) and _TURN.match(value) for value in values) and not _has_prompt(row, writer):
        return _dialogues(values, writer)
    if any(isinstance(value, list) and len(value) > 1 for value in values):
        return _conversations(row, values, columns, writer)
    if data.prompt is None:
        raise RowError(
            "no prompt",
            f"columns {columns[0]!r} and {columns[1]!r} hold answers alone; name the prompt's column in data.prompt",
        )
    better, worse = (answer_of(row, column, writer) for column in columns)
    return None, better, worse


def answer_of(row: Row, column: str, writer: PromptWriter, key: str = "") -> Message:
    """Return the assistant's message that a column holds: a text, or a list of it alone.

    Raises:
        RowError: it holds something else, or nothing.
    """
    value = cell(row, column, key or "data.completion")
    if not isinstance(value, list):
        text = filled(value, column)
        writer.check_text(text, column, row.number)
        return {"role": "assistant", "content": text}
    messages = _messages(value, column, row, writer)
    roles = [str(one["role"]) for one in messages]
    if roles != ["assistant"]:
        raise RowError(
            "wrong roles",
            f"column {column!r} must hold a text or a list of one assistant message; got messages of "
            f"{', '.join(roles)} (those that are answered belong to data.prompt)",
        )
    return checked_answer(messages[0], column)


def checked_answer(message: Message, column: str) -> Message:
    """Return an assistant's message that says or calls something.

    Raises:
        RowError: it does not.
    """
    if not message.get("tool_calls"):
        filled(message["content"], column)
    return message


def filled(value: Any, column: str) -> str:
    """Return the text of a column that something is learned from.

    Raises:
        RowError: it is empty, or a structure.
    """
    if isinstance(value, list | dict):
        part = next(
            (f"; name the part with the text: {column}.{key}" for key in ("content", "value", "text") if key in value),
            "",
        )
        raise RowError(
            "a structure where a text is needed",
            f"column {column!r} must hold a text; got {type(value).__name__}{part}",
        )
    text = "" if is_missing(value) else text_of(value)
    if not text.strip():
        raise RowError(
            "an empty column", f"column {column!r} is empty, and it is learned from; remove the row or fill it"
        )
    check_characters(text, column)
    return text


def margin_of(row: Row, column: str | None) -> float:
    """Return by how much a pair's scores should differ at least.

    Raises:
        RowError: the column holds no finite number.
    """
    if column is None:
        return 0.0
    value = cell(row, column, "data.margin")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("no number", f"column {column!r} must hold a finite number; got {value!r}")
    return number


def _has_prompt(row: Row, writer: PromptWriter) -> bool:
    prompt = writer.data.prompt
    return writer.data.template is not None or (prompt is not None and has_column(row, prompt))


def _messages(value: Any, column: str, row: Row, writer: PromptWriter) -> list[Message]:
    if writer.template is None:
        raise RowError(
            "a conversation without a chat template",
            f"column {column!r} must hold a text; got chat messages, which need a model with a chat template and "
            "data.chat not false",
        )
    return writer.messages(value, column, row.number)


def _conversations(row: Row, values: list[Any], columns: tuple[str, str], writer: PromptWriter) -> tuple[Any, ...]:
    both = [_messages(value, column, row, writer) for value, column in zip(values, columns, strict=True)]
    shared = 0
    while shared < min(map(len, both)) - 1 and both[0][shared] == both[1][shared]:
        shared += 1
    for messages, column in zip(both, columns, strict=True):
        roles = ", ".join(str(one["role"]) for one in messages[shared:])
        if roles != "assistant":
            raise RowError(
                "conversations that part before their last answer",
                f"columns {columns[0]!r} and {columns[1]!r} must be the same up to the assistant's last message; what "
                f"{column!r} has of its own is of {roles}",
            )
        checked_answer(messages[-1], column)
    prompt = both[0][:shared]
    _check_prompt(row, prompt, writer)
    return prompt, both[0][-1], both[1][-1]


def _check_prompt(row: Row, prompt: list[Message], writer: PromptWriter) -> None:
    """Check that a prompt column agrees with what both conversations begin with."""
    column = writer.data.prompt
    if column is None or not has_column(row, column) or is_missing(value := value_at(row, column)):
        return
    if isinstance(value, list):
        same = writer.messages(value, column, row.number) == [one for one in prompt if one["role"] != "system"] or (
            writer.messages(value, column, row.number) == prompt
        )
    else:
        asked = [str(one["content"]).strip() for one in prompt if one["role"] == "user"]
        same = text_of(value).strip() in asked
    if not same:
        raise RowError(
            "a prompt that is another one",
            f"column {column!r} is not what both conversations begin with; set data.prompt=null to take that",
        )


def _dialogues(values: list[str], writer: PromptWriter) -> tuple[Any, Message, Message]:
    """Return the pair of two dialogues in plain text, which part after an ``Assistant:``."""
    shared = next((i for i, (a, b) in enumerate(zip(*values, strict=False)) if a != b), min(map(len, values)))
    places = [m.end() for m in _TURN.finditer(values[0]) if m[1] == "Assistant" and m.end() <= shared]
    rest = [value[places[-1] :] if places else "" for value in values]
    if not places or any(_TURN.search(one) for one in rest) or not all(one.strip() for one in rest):
        raise RowError(
            "conversations that part before their last answer",
            "both dialogues must be the same up to their last `Assistant:`, and say something after it",
        )
    answers: list[Message] = [
        {"role": "assistant", "content": one if writer.template is None else one.strip()} for one in rest
    ]
    start = values[0][: places[-1]]
    if writer.template is None:
        return start, answers[0], answers[1]
    names = {"Human": "user", "Assistant": "assistant"}
    pieces = _TURN.split(start)[1:-2]  # the last `Assistant:` is where the answers go on
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": names[name], "content": text.strip()} for name, text in turns], answers[0], answers[1]
