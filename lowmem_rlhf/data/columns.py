"""The columns that a recipe names, and what a row has in them. No torch here."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.row_template import required_fields, template_fields
from lowmem_rlhf.data.values import Row, has_column, value_at
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig
from lowmem_rlhf.suggest import did_you_mean


def used_columns(data: DataConfig) -> list[str]:
    """Return the columns that a prompt is made of: the conversation's, the plain text's, the template's or its own."""
    return [name for _, name in _prompt_columns(data)]


def _prompt_columns(data: DataConfig) -> list[tuple[str, str]]:
    """Return (recipe key, column) of each column that a prompt is made of."""
    if data.messages is not None:
        return [("data.messages", data.messages)]
    if data.text is not None:
        return [("data.text", data.text)]
    if data.template is not None:
        return [("data.template", name) for name in template_fields(data.template)]
    if data.prompt is None:  # the beginning that both answers of a pair share
        return [("data.chosen", str(data.chosen))]
    return [("data.prompt", data.prompt)]


def check_columns(names: Collection[str] | Mapping[str, Any], data: DataConfig, source: str = "") -> None:
    """Check that all columns that the recipe names are there: the prompt's, and those of answers and classes.

    Args:
        names: the columns of a source, or one row of it.
        source: what has them, for messages.

    Raises:
        UserError: one is missing; the message names those there are.
    """
    wanted = _prompt_columns(data)
    optional = set(template_fields(data.template)) - set(required_fields(data.template)) if data.template else set()
    # The completion comes before the answer: it may be the same column, and is then the one that matters.
    for key in ("completion", "chosen", "rejected", "margin", "label", "answer"):
        if (column := getattr(data, key)) is not None:
            wanted.append((f"data.{key}", column))
    missing = []
    for key, name in wanted:
        # Of a nested column the names alone say only whether its first part is there.
        if name in names or name.split(".")[0] in names or (isinstance(names, Mapping) and name in optional):
            continue
        missing.append((key, name))
    if missing:
        # A name that the recipe gives is more likely the mistyped one than a default.
        key, name = min(missing, key=lambda one: one[0].removeprefix("data.") not in data.model_fields_set)
        remedy = "; set data.answer=null if there is no reference answer" if key == "data.answer" else ""
        raise UserError(
            f"{key}: {source or data.train} has no column {name!r}{did_you_mean(name, names)} "
            f"(its columns: {', '.join(names)}){remedy}"
        )


def check_answer_part(rows: Sequence[Row], data: DataConfig) -> None:
    """Check that some row has the nested column of reference answers.

    Raises:
        UserError: none has it.
    """
    if data.answer is None or "." not in data.answer or any(has_column(row, data.answer) for row in rows) or not rows:
        return
    parts = _parts(rows[0])
    raise UserError(
        f"data.answer: no row of {data.train} has {data.answer!r}{did_you_mean(data.answer, parts)} (row "
        f"{rows[0].number} has {', '.join(parts)}); set data.answer=null if there is no reference answer"
    )


def _parts(value: Mapping[str, Any], before: str = "") -> list[str]:
    """Return the columns of a row and the parts of nested ones, as dotted names."""
    names = []
    for name, part in value.items():
        inner = part if isinstance(part, Mapping) else dict(enumerate(part)) if isinstance(part, list) else {}
        names += [f"{before}{name}", *_parts({str(k): v for k, v in list(inner.items())[:5]}, f"{before}{name}.")]
    return names


def cell(row: Row, column: str, key: str, needed: bool = True) -> Any:
    """Return what a row has in a column.

    Raises:
        RowError: it lacks the column, where it is needed.
    """
    if needed and not has_column(row, column):
        raise RowError(
            "a missing column",
            f"it has no column {column!r} ({key}){did_you_mean(column, row)} (its columns: {', '.join(row)})",
        )
    return value_at(row, column)


def check_characters(text: str, column: str) -> None:
    """Check that a text is one of whole characters, which tokenizers need.

    Raises:
        RowError: it holds half of a surrogate pair.
    """
    if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in text):
        raise RowError("half a character", f"column {column!r} holds half of a surrogate pair, which is no character")
