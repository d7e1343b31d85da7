"""The result of an evaluation as a table. No torch here."""

from typing import Any

from rich.console import Console
from rich.text import Text

from lowmem_rlhf.display.format import format_number
from lowmem_rlhf.display.tables import fitted, plain_table
from lowmem_rlhf.plain_text import harmless


def outcome_rows(outcome: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of an outcome's table: each quantity with its interval by target, then by task."""
    results, difference = outcome.get("results") or {}, outcome.get("difference") or {}
    head = ["held-out", *results, *(["difference"] if difference else [])]
    rows = _rows(results, difference)
    rows.sort(key=lambda row: row[0] != outcome.get("headline"))
    tasks = outcome.get("tasks")  # of lm-eval: their names
    for task, own in tasks.items() if isinstance(tasks, dict) else ():
        rows += [[f"{task}: {name}", *cells] for name, *cells in _rows(own.get("results") or {}, own.get("difference"))]
    return head, rows


def _rows(results: dict[str, Any], difference: dict[str, Any] | None) -> list[list[str]]:
    names = dict.fromkeys(name for one in results.values() for name in one)
    columns = [*results.values(), *([difference] if difference else [])]
    return [[name, *(_cell(column.get(name)) for column in columns)] for name in names]


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
    console = fitted(console or Console())
    head, rows = outcome_rows(outcome)
    console.print(plain_table(head, (tuple(row) for row in rows)))
    console.print(Text(harmless(about(outcome)), style="dim"))
    console.print(Text(harmless(str(outcome.get("method", ""))), style="dim"))


def _cell(estimate: dict[str, Any] | None) -> str:
    if not estimate:
        return "-"
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    if low is None and high is None:
        return format_number(value)
    return f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"
