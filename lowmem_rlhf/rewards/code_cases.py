"""Tests of whole programs, as data sets of contests have them: what stands on standard input, and what is printed."""

import json
from contextlib import suppress
from typing import Any

Case = tuple[str, str]  # what a program reads, and what it should print

_NAMES = (("inputs", "outputs"), ("input", "output"))  # of APPS, TACO; of code_contests
_KINDS = (None, "stdin", "stdin_stdout")  # of LiveCodeBench, and those that have its problems


def cases_of(value: Any) -> list[Case]:
    """Return the cases that a column's value holds; empty where it holds none, or something else.

    Args:
        value: ``{"inputs": [...], "outputs": [...]}``, the same in the singular, or a list of ``{"input": ...,
            "output": ...}``; or JSON text of these. An input or output is a text or a list of lines. Cases that call a
            function (``fn_name``, ``testtype: functional``) are none.
    """
    value = parsed(value)
    found = [
        _case(one) for one in (_rows(value) if isinstance(value, dict) else value if isinstance(value, list) else [])
    ]
    cases = [one for one in found if one is not None]
    return cases if len(cases) == len(found) else []


def parsed(value: Any) -> Any:
    """Return what a text of JSON holds, which as Python would always pass as a test; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _rows(struct: dict[str, Any]) -> list[Any]:
    for names in _NAMES:
        given, wanted = (struct.get(name) for name in names)
        if isinstance(given, list) and isinstance(wanted, list) and len(given) == len(wanted):
            kind = {"fn_name": struct.get("fn_name")}
            return [{"input": one, "output": other, **kind} for one, other in zip(given, wanted, strict=True)]
    return []


def _case(row: Any) -> Case | None:
    if not isinstance(row, dict) or row.get("fn_name") is not None:
        return None
    if any(row.get(name) not in _KINDS for name in ("type", "testtype")):
        return None
    given, wanted = _text(row.get("input")), _text(row.get("output"))
    return None if given is None or wanted is None else (given, wanted)


def _text(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None
