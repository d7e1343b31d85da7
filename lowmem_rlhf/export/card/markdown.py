"""Texts of a run inside of Markdown: shown as they are, never read as HTML, links, tables or fences."""

import re
from typing import Any

from lowmem_rlhf.plain_text import harmless
from lowmem_rlhf.recipe.secrets import masked

# what begins code, emphasis, a link, HTML, an entity or a formula; [0.1, 0.2] is an interval
_SPECIAL = re.compile(r"(\[[-\d., ]+\](?![(\[:]))|([\\`*<>&~$\[\]])")
_ADDRESS = re.compile(r"(?i)\b(https?|ftp|mailto)(:)|\b(www)(\.)")  # which readers make links of by themselves
_BLOCK = re.compile(r"^([#+\-=|]|\d+(?=[.)](\s|$)))")  # what begins a heading, a list, a rule or a table


class Markdown(str):
    """Text that is Markdown already."""


def plain(value: Any) -> str:
    """Return a value as one line of Markdown that shows it as it is."""
    text = _SPECIAL.sub(lambda match: match[1] or f"\\{match[2]}", _line(value))
    text = _ADDRESS.sub(lambda match: f"{match[1] or match[3]}\\{match[2] or match[4]}", text)
    return _BLOCK.sub(lambda match: f"\\{match[0]}" if not match[0].isdigit() else f"{match[0]}\\", text)


def code(value: Any) -> Markdown:
    """Return a value as code within a line."""
    text = _line(value)
    ticks = "`" * (_longest(text) + 1)
    space = " " if not text or "`" in (text[0], text[-1]) else ""
    return Markdown(f"{ticks}{space}{text}{space}{ticks}")


def fenced(text: str, language: str = "") -> Markdown:
    """Return lines of code as a block that none of them can end."""
    fence = "`" * max(3, _longest(text) + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def link(text: str, address: str) -> Markdown:
    """Return a link; the address is this package's own, of parts that were checked."""
    return Markdown(f"[{plain(text)}]({address})")


def table(head: Any, rows: Any) -> Markdown:
    """Return a table of cells that are shown as they are, or are `Markdown`; bars inside a cell are escaped."""
    lines = [head, [Markdown("---")] * len(head), *rows]
    return Markdown("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))


def _line(value: Any) -> str:
    return harmless(masked(" ".join(str(value).split())))


def _cell(value: Any) -> str:
    text = value if isinstance(value, Markdown) else plain(str(value).replace("\n", "⏎"))
    return text.replace("|", "\\|")


def _longest(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
