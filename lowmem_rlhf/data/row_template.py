"""`data.template`: a user's turn made of a row's columns. No torch here."""

import re
from collections.abc import Mapping
from string import Formatter

from lowmem_rlhf.errors import UserError

_PARAGRAPHS = re.compile(r"(\n[ \t]*\n\s*)")


def template_fields(template: str) -> list[str]:
    """Return the columns that a template names, in order and once each, without the mark of optional ones.

    Raises:
        UserError: the template has an unbalanced brace, or a place-holder that is more than a column's name.
    """
    return list(dict.fromkeys(name.rstrip("?") for _, name in _parts(template) if name))


def required_fields(template: str) -> list[str]:
    """Return the columns of `template_fields` that must not be empty: those that once stand without ``?``."""
    return list(dict.fromkeys(name for _, name in _parts(template) if name and not name.endswith("?")))


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Return a template with texts in place of its columns.

    A paragraph (what stands between empty lines) whose columns are all optional and empty is left out, with the empty
    lines before it, or after it where it is the first. So is such a line of a paragraph, and the space before such a
    column within a line.

    Args:
        values: the text of each column; an optional one may be absent or blank.
    """

    def empty(part: str) -> bool:
        names = [name for _, name in _parts(part) if name]
        return bool(names) and not any(values.get(name.rstrip("?"), "").strip() for name in names)

    pieces = _PARAGRAPHS.split(template)  # paragraph, separator, paragraph, ...
    kept: list[str] = []
    for index in range(0, len(pieces), 2):
        if not empty(pieces[index]):
            lines = [_line(line, values) for line in pieces[index].split("\n") if not empty(line)]
            kept += [pieces[index - 1], "\n".join(lines)] if kept else ["\n".join(lines)]
    return "".join(kept)


def _line(line: str, values: Mapping[str, str]) -> str:
    text = ""
    for before, name in _parts(line):
        value = values.get(name.rstrip("?"), "") if name else ""
        text += before.rstrip(" ") if name.endswith("?") and not value.strip() else before + value
    return text


def _parts(template: str) -> list[tuple[str, str]]:
    """Return (text, column) pairs; the column is empty where only text is left."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"data.template: {template!r} is not a template ({error}); write {{column}}, and {{{{ or }}}} for a brace"
        ) from error
    for _, name, spec, conversion in parts:
        if name is not None and (not name.rstrip("?") or spec or conversion):
            raise UserError(
                f"data.template: {template!r} has a place-holder that is not just a column's name; write {{column}} "
                "(or {column?} where it may be empty), and {{ or }} for a brace"
            )
    return [(text, name or "") for text, name, _, _ in parts]
