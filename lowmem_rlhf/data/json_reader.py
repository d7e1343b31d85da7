"""JSON and JSON lines, read with the standard library: no types are guessed, and a number keeps its literal."""

import json
import json.scanner
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from lowmem_rlhf.data.json_shapes import rows_in
from lowmem_rlhf.data.text_files import BrokenFile, NoRows
from lowmem_rlhf.data.values import JsonFloat, JsonInt, Row

MAX_DEPTH = 100  # of lists and objects in one another; far below what later steps can walk through
_SPACE = " \t\r\n"
BLANK = " \t\r\ufeff"  # what does not count at the ends of a line
_HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")  # one half of a surrogate pair, perhaps beside the other


class _Refused(Exception):
    """A value that is JSON for Python, and is not taken; the message is a clause."""


def read_json(text: str, name: str, field: str | None = None, lines: bool = False) -> tuple[list[Row], str]:
    """Return the rows of a JSON file, and what is to be said about where they were found (or an empty text).

    JSON lines, a list of objects, and one object are told apart by what the file holds. A row's number is its line in
    JSON lines, and its place from 1 otherwise.

    Args:
        text: the whole file.
        name: the file, for messages.
        field: the key, dotted for keys in keys, that the rows lie under.
        lines: whether the file's name says JSON lines; one object is then one row.

    Raises:
        BrokenFile: it is not JSON, or holds something that is not taken; the message names the line.
        UserError: ``field`` is needed, or names nothing.
    """
    first_two = list(islice(_lines(text), 2))
    if not first_two:
        raise NoRows("it has no rows")
    if field is None and is_lines([line for _, line in first_two], lines):
        return _read_lines(text), ""
    documents = _documents(text)
    if len(documents) == 1:
        objects, note = rows_in(documents[0], name, field, lines)
    elif field is None:
        objects, note = documents, ""
    else:
        objects, note = documents, f"data.field has no effect: its {len(documents)} rows do not lie under a key"
    for number, row in enumerate(objects, 1):
        _check_row(row, f"row {number}", _HALF.search(text) is not None)
    return [Row(row, number) for number, row in enumerate(objects, 1)], note


def _lines(text: str) -> Iterator[tuple[int, str]]:
    r"""Go through (number from 1, line) of the lines that hold something, cut at \n alone."""
    start, number = 0, 0
    while start <= len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        number += 1
        if line := text[start:end].strip(BLANK):
            yield number, line
        start = end + 1


def is_lines(first: list[str], lines: bool) -> bool:
    """Whether a file holds one JSON value a line, as far as its first two lines that hold something tell."""
    if not first[0].startswith(("{", "[")):
        return True
    if len(first) == 1:
        return lines and first[0].startswith("{")
    if _parses(first[0]):
        return True
    if first[0].startswith("["):
        return False
    # The first line is broken, or it is the first of an object that goes on.
    return _parses(first[1]) or (lines and first[0] != "{")


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        return not isinstance(error, json.JSONDecodeError)
    return True


def _read_lines(text: str) -> list[Row]:
    read = line_reader()
    return [read(number, line) for number, line in _lines(text)]


def line_reader() -> Callable[[int, str], Row]:
    """Return what makes a row of a line of JSON lines that holds something, given its number and its text.

    It raises `BrokenFile` where the line is no row.
    """
    decoder = _decoder()

    def read(number: int, line: str) -> Row:
        try:
            row = decoder.decode(line)
            if not isinstance(row, dict) or line.count("{") + line.count("[") > MAX_DEPTH or _HALF.search(line):
                _check_row(row, f"line {number}", True)
        except json.JSONDecodeError as error:
            raise BrokenFile(_not_json(error, number)) from error
        except _Refused as error:
            raise BrokenFile(f"line {number} {error}") from error
        except RecursionError as error:
            raise BrokenFile(f"line {number} {_too_deep()}") from error
        return Row(row, number)

    return read


def _documents(text: str) -> list[Any]:
    """Return the JSON values of a text, one after another."""
    decoder, start = _decoder(), 0
    values: list[Any] = []
    while True:
        while start < len(text) and text[start] in _SPACE:
            start += 1
        if start == len(text):
            return values
        try:
            value, start = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise BrokenFile(_not_json(error, error.lineno)) from error
        except RecursionError as error:
            raise BrokenFile(f"line {_line_of_depth(text)} {_too_deep()}") from error
        except _Refused as error:
            raise BrokenFile(f"the object that begins in line {_line_of_refused(text, start)} {error}") from error
        values.append(value)


def _not_json(error: json.JSONDecodeError, line: int) -> str:
    place = f" column {error.colno}" if error.msg.endswith(" at") else f" (column {error.colno})"
    remedy = r"; a line break or a tab in a text is written \n, \t" if "control character" in error.msg else ""
    return f"line {line} is not JSON: {error.msg}{place}{remedy}"


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(
        parse_float=JsonFloat, parse_int=_integer, parse_constant=_constant, object_pairs_hook=_object
    )


def _integer(literal: str) -> int:
    try:
        return JsonInt(literal) if literal == "-0" else int(literal)
    except ValueError as error:
        raise _Refused(
            f"holds a whole number of {len(literal)} digits, which is too long for a number; write it as a text"
        ) from error


def _constant(literal: str) -> float:
    if literal == "NaN":  # what pandas and NumPy write for a missing number
        return float("nan")
    raise _Refused(f"holds {literal}, which is no JSON number; write a number, a text or null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"has the key {twice!r} twice; which value counts cannot be known, remove one")
    return mapping


def _check_row(row: Any, where: str, may_hold_halves: bool) -> None:
    if not isinstance(row, dict):
        raise BrokenFile(f"{where} is not a JSON object with a value for each column")
    if _depth(row) > MAX_DEPTH:
        raise BrokenFile(f"{where} {_too_deep()}")
    if may_hold_halves:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = str(error.object)[error.start]
            raise BrokenFile(
                f"{where} holds half of a character (\\u{ord(half):04x} without its other half), which is no text; "
                "write the whole character, or remove it"
            ) from error


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
    return depth


def _too_deep() -> str:
    return f"holds lists or objects more than {MAX_DEPTH} deep in one another; write a flatter row"


def _line_of_depth(text: str) -> int:
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
        depth += 1 if match[0] in "[{" else -1 if match[0] in "]}" else 0
        if depth > MAX_DEPTH:
            return text.count("\n", 0, match.start()) + 1
    return 1


def _line_of_refused(text: str, start: int) -> int:
    """Return the line of the object that is refused: read once more, slowly, by a scanner that knows its place."""
    # What the decoder and its scanner are made of is no part of their declared types.
    decoder: Any = _decoder()
    scanner: Any = json.scanner
    begun = [start]
    parse_object = decoder.parse_object

    def noted(text_and_place: tuple[str, int], *others: Any) -> Any:
        begun.append(text_and_place[1])
        made = parse_object(text_and_place, *others)
        begun.pop()
        return made

    decoder.parse_object = noted
    decoder.scan_once = scanner.py_make_scanner(decoder)
    with suppress(_Refused):
        decoder.raw_decode(text, start)
    return text.count("\n", 0, begun[-1]) + 1
