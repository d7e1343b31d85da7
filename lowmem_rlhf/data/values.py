"""The rows of a data source, and what their values are as texts. No torch here.

A value is what the file holds: a text stays that text, a JSON number keeps its type, and its text is the literal that
stands in the file.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MISSING = object()


class Row(dict[str, Any]):
    """A row: values by column, and its number in its source, from 1."""

    number: int

    def __init__(self, values: Mapping[str, Any], number: int) -> None:
        super().__init__(values)
        self.number = number


class JsonInt(int):
    """A JSON integer whose digits are not those that Python would write (``-0``)."""

    literal: str

    def __new__(cls, literal: str) -> "JsonInt":
        """Read a literal; ValueError where Python refuses it."""
        made = super().__new__(cls, literal)
        made.literal = literal
        return made


class JsonFloat(float):
    """A JSON number with a fraction or an exponent, with its literal (``1.50``, ``1e3``)."""

    literal: str

    def __new__(cls, literal: str) -> "JsonFloat":
        """Read a literal."""
        made = super().__new__(cls, literal)
        made.literal = literal
        return made


def numbered(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return rows with their numbers; those that have none are counted from 1."""
    return [row if isinstance(row, Row) else Row(row, place) for place, row in enumerate(rows, start=1)]


def text_of(value: Any) -> str:
    """Return a value as the text that is learned: a number's literal, ``true``, and JSON for what has parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, JsonInt | JsonFloat):
        return value.literal
    if isinstance(value, dict | list):
        return _json(value)
    return str(value)


def _json(value: Any) -> str:
    """Return a value as JSON in which numbers keep their literals."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(str(key))}: {_json(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    if isinstance(value, JsonInt | JsonFloat):
        return value.literal
    return json.dumps(value, ensure_ascii=False, default=str)


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, or a float that is no number."""
    return value is None or (isinstance(value, float) and value != value)


def value_at(row: Mapping[str, Any], column: str, default: Any = None) -> Any:
    """Return the value of a column, ``a.b`` being the part ``b`` of column ``a`` where no column has that name.

    A part of a list is named by its place, from 0: ``answers.text.0``.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = _part(value, part)
        if value is _MISSING:
            return default
    return value


def has_column(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row has a column, or the part that a dotted name says (see `value_at`)."""
    return value_at(row, column, _MISSING) is not _MISSING


def _part(value: Any, part: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(part, _MISSING)
    if isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
        return value[int(part)]
    return _MISSING
