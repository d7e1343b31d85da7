"""Results of evaluations as they are kept (``evaluations.jsonl`` of a run, one object a line) and shown. No torch here.

One object: ``made`` (time, UTC), ``version``, ``steps`` the policy was trained for, ``data``, ``samples``,
``temperature``, ``max_completion_length``, ``seed``, ``counts`` (of problems, examples or pairs), ``results`` (quantity
by subject, each with ``value``, ``low`` and ``high``), ``difference`` (second subject less the first) and ``method``.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import append_lines, read_lines
from lowmem_rlhf.report.format import format_number
from lowmem_rlhf.report.live import plain_table

EVALUATIONS = "evaluations.jsonl"
WIDTH = 120  # columns of a table that goes to a file or another program


def keep(folder: Path, outcome: dict[str, Any]) -> Path:
    """Append an evaluation to those of a run; return the file.

    Raises:
        UserError: the run's folder cannot be written.
    """
    path = folder / EVALUATIONS
    try:
        append_lines(path, [outcome])
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); --json prints the results") from error
    return path


def kept(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run, oldest first.

    Raises:
        UserError: the file cannot be read.
    """
    return [row for _, row in read_lines(folder / EVALUATIONS)]


def outcome_rows(outcome: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of an outcome's table: each quantity with its interval by subject."""
    results, difference = outcome.get("results") or {}, outcome.get("difference") or {}
    names = list(dict.fromkeys(name for one in results.values() for name in one))
    head = ["held-out", *results, *(["difference"] if difference else [])]
    columns = [*results.values(), *([difference] if difference else [])]
    return head, [[name, *(_cell(column.get(name)) for column in columns)] for name in names]


def about(outcome: dict[str, Any]) -> str:
    """Return on one line what an outcome was measured on and how."""
    parts = [f"{format_number(count)} held-out {noun}s" for noun, count in (outcome.get("counts") or {}).items()]
    if outcome.get("samples"):
        answers = "1 answer" if outcome["samples"] == 1 else f"{outcome['samples']} answers"
        parts.append(f"{answers} each at temperature {format_number(outcome.get('temperature'))}")
    if outcome.get("steps") is not None:
        parts.append(f"policy after {format_number(outcome['steps'])} steps")
    return ", ".join([*parts, f"data {outcome.get('data', '?')}"])


def print_outcome(outcome: dict[str, Any], console: Console | None = None) -> None:
    """Print an outcome as a table, and what it was measured on."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    head, rows = outcome_rows(outcome)
    console.print(plain_table(head, (tuple(row) for row in rows)))
    console.print(Text(about(outcome), style="dim"))
    console.print(Text(str(outcome.get("method", "")), style="dim"))


def _cell(estimate: dict[str, Any] | None) -> str:
    if not estimate:
        return "-"
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    if low is None and high is None:
        return format_number(value)
    return f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"
