"""Where the rows of a JSON file lie: in a list, under a key, in columns, or as pandas writes a table."""

from typing import Any

from lowmem_rlhf.data.text_files import BrokenFile, NoRows
from lowmem_rlhf.data.values import has_column, value_at
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.suggest import did_you_mean

_SEARCHED = 3  # keys in keys


def rows_in(value: Any, name: str, field: str | None = None, one_row: bool = False) -> tuple[list[Any], str]:
    """Return the rows that a JSON value holds, each still any value, and what is to be said (or an empty text).

    Args:
        value: what the file holds.
        name: the file, for messages.
        field: the key that the rows lie under; a list of rows is taken where the value is one itself.
        one_row: whether an object is one row, whatever it looks like.

    Raises:
        NoRows: the list is empty.
        BrokenFile: columns of different lengths.
        UserError: ``field`` names no key, or several keys could be meant.
    """
    note = ""
    if field is not None and isinstance(value, dict):
        if not has_column(value, field):
            raise UserError(
                f"data.field: {name} has no key {field!r}{did_you_mean(field, value)} (its keys: {', '.join(value)})"
            )
        value, one_row = value_at(value, field), False
        if not isinstance(value, dict | list):
            raise UserError(f"data.field: {field!r} of {name} holds {_kind(value)}, not rows; name a key with a list")
    elif field is not None:
        note = "data.field has no effect: its rows do not lie under a key"
    if isinstance(value, dict) and not one_row:
        value, note = _rows_of_object(value, name, field)
    rows = value if isinstance(value, list) else [value]
    if not rows:
        raise NoRows("it has no rows")
    if all(isinstance(row, str) for row in rows):
        return [{"text": row} for row in rows], f"its {len(rows)} texts are the rows of a column `text`"
    return rows, note


def _rows_of_object(value: dict[str, Any], name: str, field: str | None) -> tuple[list[Any], str]:
    """Return the rows of one object, which may be a row itself."""
    dot = f"{field}." if field else ""
    for shape in (_split_table, _columns, _tables_of_pandas):
        if (found := shape(value)) is not None:
            return found
    if any(_is_chat(part) for part in value.values()):
        return [value], ""
    keys = _candidates(value)
    if not keys:
        return [value], "it holds one object, which is one row"
    if len(keys) > 1:
        raise UserError(
            f"data.field: rows lie under several keys of {name}: {', '.join(dot + key for key in keys)}; set "
            f"data.field={dot + keys[0]}, or to another of them"
        )
    rows = value_at(value, keys[0])
    return rows, f"its {len(rows)} rows lie under the key {dot + keys[0]!r} (data.field={dot + keys[0]})"


def _candidates(value: dict[str, Any], depth: int = 1) -> list[str]:
    """Return the keys, those of the outermost objects that have any, under which there is a list of objects."""
    here = [key for key, part in value.items() if isinstance(part, list) and part and _all(part, dict)]
    if here or depth == _SEARCHED:
        return here
    return [
        f"{key}.{inner}"
        for key, part in value.items()
        if isinstance(part, dict)
        for inner in _candidates(part, depth + 1)
    ]


def _split_table(value: dict[str, Any]) -> tuple[list[Any], str] | None:
    """Read what `DataFrame.to_json(orient="split")` writes."""
    names, cells = value.get("columns"), value.get("data")
    if not (set(value) <= {"columns", "index", "data", "name"} and isinstance(names, list) and isinstance(cells, list)):
        return None
    if not _all(names, str) or not _all(cells, list) or any(len(row) != len(names) for row in cells):
        return None
    return [dict(zip(names, row, strict=True)) for row in cells], "it holds a table as pandas splits it"


def _columns(value: dict[str, Any]) -> tuple[list[Any], str] | None:
    """Read an object that holds a list for each column."""
    lists = list(value.values())
    if not value or not _all(lists, list) or any(_is_chat(part) for part in lists):
        return None
    if all(part and _all(part, dict) for part in lists):
        return None  # lists of rows
    lengths = {key: len(part) for key, part in value.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise BrokenFile(f"it holds columns of different lengths ({told}); give each as many values, or a list of rows")
    made = [dict(zip(value, cells, strict=True)) for cells in zip(*lists, strict=True)]
    return made, f"it holds a list for each column, {len(made)} rows"


def _tables_of_pandas(value: dict[str, Any]) -> tuple[list[Any], str] | None:
    """Read what `DataFrame.to_json` writes: an object for each column, or (orient="index") one for each row."""
    inside = list(value.values())
    if not value or not _all(inside, dict) or not all(inside):
        return None
    places = list(inside[0])
    if all(place.isdigit() for part in inside for place in part):
        places = list(dict.fromkeys(place for part in inside for place in part))
        rows = [{name: part[place] for name, part in value.items() if place in part} for place in places]
        return rows, f"it holds an object for each column, {len(rows)} rows"
    if all(key.isdigit() for key in value) or (len(value) > 1 and all(list(part) == places for part in inside)):
        return inside, f"it holds an object for each row, {len(inside)} rows"
    return None


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of chat messages, and so a cell and no list of rows."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, dict) and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
            for one in value
        )
    )


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def _kind(value: Any) -> str:
    return "null" if value is None else f"{value!r:.40}"
