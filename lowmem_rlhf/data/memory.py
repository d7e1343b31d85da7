"""Rows that a Python program holds, as a table: a `datasets.Dataset`, a DataFrame, or mappings of columns to values."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lowmem_rlhf.data.table import DatasetTable, RowTable, Table
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import LowmemError, UserError
from lowmem_rlhf.user_code import describe


def table_of(rows: Any, name: str) -> Table:
    """Return a program's rows as a table; the number of a row is its place, from 1.

    Args:
        rows: a `datasets.Dataset`, a pandas DataFrame, or an iterable of mappings, which is read once.
        name: the argument, for messages.

    Raises:
        UserError: it is something else, reading it fails, a row is no mapping or has a column that is no text, two
            columns have one name, or there is no row.
    """
    origins = frozenset({f"object {id(rows)}"})  # the same rows given twice are known as such
    if hasattr(rows, "select_columns") and hasattr(rows, "column_names") and hasattr(rows, "__len__"):
        shown_as = getattr(rows, "format", {}).get("type")
        as_values = shown_as in (None, "custom")  # and not as tensors or arrays; custom: a transform of the program's
        table: Table = DatasetTable(rows if as_values else rows.with_format(None), origins)
    elif hasattr(rows, "to_dict") and hasattr(rows, "notna") and hasattr(rows, "columns"):
        if not rows.columns.is_unique:
            twice = rows.columns[rows.columns.duplicated()][0]
            raise UserError(f"{name}: got a DataFrame with two columns {twice!r}; rename one or leave it out")
        present = rows.astype(object).where(rows.notna(), None)
        table = RowTable(_rows(present.to_dict("records"), name), [str(one) for one in rows.columns], origins)
    elif isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise UserError(
            f"{name}: got a {type(rows).__name__}; give a path, a Hub id, rows (mappings of columns to values), a "
            "datasets.Dataset or a DataFrame"
        )
    else:
        table = RowTable(_rows(rows, name), None, origins)
    if not len(table):
        raise UserError(f"{name}: there is no row in it; give at least one (a generator is read once)")
    return table


def _rows(rows: Iterable[Any], name: str) -> list[Row]:
    numbered = []
    for number, row in enumerate(_read(rows, name), start=1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{name}: row {number} is a {type(row).__name__}; a row maps columns to values, for example "
                "{'question': '2 + 3 = ?', 'answer': '5'}"
            )
        if wrong := [column for column in row if not isinstance(column, str)]:
            raise UserError(f"{name}: row {number} has the column {wrong[0]!r}; the name of a column is a text")
        numbered.append(Row({column: plain(value) for column, value in row.items()}, number))
    return numbered


def _read(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Go through rows; what the program's own code raises on the way is told as such."""
    try:
        yield from rows
    except LowmemError:
        raise
    except Exception as error:
        raise UserError(f"{name}: reading the rows failed: {describe(error)}") from error


def plain(value: Any) -> Any:
    """Return numbers and arrays of numpy's or torch's as Python's numbers and lists, also those inside a value."""
    if getattr(value, "shape", None) is not None and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return {key: plain(one) for key, one in value.items()} if isinstance(value, dict) else value
