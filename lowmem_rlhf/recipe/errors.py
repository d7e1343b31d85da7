"""What is wrong with a recipe, in plain words: pydantic's errors as one line for each wrong key."""

from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from lowmem_rlhf.recipe.names import suggestion


class OptionErrors(ValueError):
    """What is wrong with the keys below a field, a line each.

    Args:
        lines: each begins with its key.
        below: the part of the field that holds the keys; empty: the field itself.
    """

    def __init__(self, lines: list[str], below: str = "options") -> None:
        super().__init__("; ".join(lines))
        self.lines, self.below = lines, below


def explain(errors: Sequence[Any], section: type[BaseModel]) -> list[str]:
    """Return one line for each wrong key; a value that may be of several kinds is an error for each of them.

    Args:
        errors: what pydantic's ValidationError holds.
        section: the schema that the values were checked against.
    """
    lines: list[str] = []
    expected: dict[str, tuple[Any, list[str]]] = {}
    for item in errors:
        where = _place(item["loc"], section)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
        if item["type"] == "extra_forbidden":
            allowed = _fields_at(where[:-1], section)
            hint = suggestion(where, allowed, section)
            lines.append(f"{key}: unknown key{hint} (allowed: {', '.join(allowed)})")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing; it has to be given")
        elif item["type"] == "value_error" and isinstance(item["ctx"]["error"], OptionErrors):
            place = f"{key}.{below}" if (below := item["ctx"]["error"].below) else key
            lines += [f"{place}.{line}" for line in item["ctx"]["error"].lines]
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])
            lines.append(f"{key}: {text}" if key else text)
        elif item["type"] in ("model_type", "model_attributes_type"):
            lines.append(
                f"{key}: got {_shown(item['input'])}; it should hold keys ({', '.join(_fields_at(where, section))})"
            )
        else:
            expected.setdefault(key, (item["input"], []))[1].append(_expectation(item["msg"]))
    lines += [
        f"{key}: got {_shown(got)}; it should be {' or '.join(dict.fromkeys(kinds))}"
        for key, (got, kinds) in expected.items()
    ]
    return lines


_SHOWN = 120  # characters of a value in a message


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _expectation(message: str) -> str:
    """Return what pydantic's message says that a value should be, in plain words."""
    if "exceeded maximum size" in message:
        return "a number of fewer digits"
    kind = message.removeprefix("Input should be ").split(", ")[0] if ", unable" in message else message
    kind = kind.removeprefix("Input should be ").removeprefix("Input should ")
    return (
        _PLAIN_WORDS.get(kind, kind)
        .replace("greater than or equal to", "at least")
        .replace("less than or equal to", "at most")
    )


_PLAIN_WORDS = {
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid integer, got a number with a fractional part": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid list": "a list, written [a, b]",
    "a valid dictionary": "keys with values, written {a: 1}",
    "List should have at least 1 item after validation, not 0": "a list of at least one",
}


def _place(loc: tuple[str | int, ...], section: type[BaseModel]) -> list[str | int]:
    """Return an error's place without pydantic's names for the kinds of a value (``bool``, ``literal['auto']``)."""
    for end in range(1, len(loc)):
        part = loc[end]
        if isinstance(part, str) and not isinstance(loc[end - 1], int) and not _holds_keys(loc[:end], section):
            return list(loc[:end])
    return list(loc)


def _holds_keys(where: tuple[str | int, ...], section: type[BaseModel]) -> bool:
    """Say whether a place holds keys of the schema."""
    field = section.model_fields.get(str(where[0]))
    inner = field and _section_in(field.annotation)
    return bool(field and inner) and (len(where) == 1 or get_origin(field.annotation) is list)  # type: ignore[union-attr]


def _fields_at(where: Sequence[Any], section: type[BaseModel]) -> list[str]:
    for part in where:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the part of a schema that a field is, or is a list of; None for a plain value."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)
