"""A run in a Jupyter notebook: one output that is written anew with every step, and messages above it."""

from collections import deque
from html import escape
from typing import Any

from lowmem_rlhf.display.format import (
    evaluation_table,
    format_bytes,
    format_number,
    format_seconds,
    format_value,
    number,
)

_RECENT = 10  # steps that the time left is read from
_COLUMNS = ("step", "reward/mean", "loss", "kl", "completion/mean_length", "time/step")


class NotebookDisplay:
    """Shows plan, steps and results as HTML of one cell's output."""

    def __init__(self) -> None:
        """Make the output."""
        from IPython.display import HTML, display

        self._html = HTML
        self._handle = display(HTML(""), display_id=True)
        self._messages: list[str] = []
        self._tables: list[str] = []
        self._rows: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self._phase, self._total, self._step = "", 0, 0
        self._step_seconds: float | None = None  # as the plan predicts it

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the current part of the work where it changes, and a few times inside it."""
        shown = f"{name} {done}/{total}" if total else name
        if name != self._phase.partition(" ")[0] or not total or done == total or done % max(1, total // 10) == 0:
            self._phase = shown
            self._write()

    def message(self, text: str) -> None:
        """Show a line that stays."""
        self._messages.append(text)
        self._write()

    def plan(self, plan: dict[str, Any]) -> None:
        """Show the settings with their reasons, folded."""
        settings, reasons = plan.get("settings") or {}, plan.get("reasons") or {}
        memory = plan.get("memory") or {}
        self._step_seconds = (plan.get("time") or {}).get("step_seconds")
        rows = [(key, format_value(value), str(reasons.get(key, ""))) for key, value in settings.items()]
        peak = f"plan: peak {format_bytes(memory.get('peak_bytes'))} of {format_bytes(memory.get('budget_bytes'))}"
        table = _table(("setting", "value", "why"), rows)
        self._tables.append(f"<details><summary>{escape(peak)}</summary>{table}</details>")
        self._write()

    def begin(self, total_steps: int, step: int) -> None:
        """Show the bar of steps."""
        self._total, self._step = total_steps, step
        self._write()

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a finished step."""
        self._step = int(metrics["step"])
        self._rows.append(metrics)
        self._phase = ""
        self._write()

    def end(self) -> None:
        """Show that no more steps come."""
        self._phase = ""
        self._write()

    def evaluation(self, evaluation: dict[str, Any]) -> None:
        """Show the held-out results before and after."""
        head, rows = evaluation_table(evaluation, ratio=False)
        if rows:
            self._tables.append(_table(head, rows))
            self._write()

    def _write(self) -> None:
        if self._handle is not None:
            self._handle.update(self._html(self._content()))

    def _content(self) -> str:
        parts = [f"<div>{escape(text)}</div>" for text in self._messages]
        parts += self._tables[:1]
        if self._total:
            times = [seconds for row in self._rows if (seconds := number(row.get("time/step"))) is not None]
            each = sum(times) / len(times) if times else self._step_seconds
            left = f", ETA {format_seconds(each * (self._total - self._step))}" if each else ""
            left += ", predicted" if left and not times else ""
            parts.append(
                f'<div><progress value="{self._step}" max="{self._total}"></progress> '
                f"step {self._step}/{self._total}{left} {escape(self._phase)}</div>"
            )
        elif self._phase:
            parts.append(f"<div>{escape(self._phase)}</div>")
        columns = [name for name in _COLUMNS if any(row.get(name) is not None for row in self._rows)]
        if columns:
            parts.append(_table(columns, [[format_number(row.get(name)) for name in columns] for row in self._rows]))
        return "\n".join([*parts, *self._tables[1:]])


def _table(head: Any, rows: Any) -> str:
    cells = "".join(f"<th>{escape(str(one))}</th>" for one in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(one))}</td>" for one in row) + "</tr>" for row in rows)
    return f'<table style="text-align:left"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
