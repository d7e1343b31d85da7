"""A run in a Jupyter notebook: one output that is written anew while the run goes on, and messages above it."""

from collections import deque
from collections.abc import Sequence
from html import escape
from typing import Any

from lowmem_rlhf.display.format import (
    GIB,
    evaluation_table,
    format_bytes,
    format_number,
    format_seconds,
    format_value,
)
from lowmem_rlhf.display.panel import shortened
from lowmem_rlhf.display.state import RECENT, RunState

_COLUMNS = ("step", "reward/mean", "loss", "kl", "completion/mean_length", "completion/truncated", "time/step")
_SAMPLE = 400  # characters of a sample
_ROW = "white-space:nowrap;overflow:hidden;text-overflow:ellipsis"  # a row's height is the same whatever is in it


class NotebookDisplay:
    """Shows plan, steps and results as HTML of one cell's output."""

    def __init__(self) -> None:
        """Make the output."""
        from IPython.display import HTML, display

        self._html = HTML
        self._handle = display(HTML(""), display_id=True)
        self._messages: list[str] = []
        self._tables: list[str] = []
        self._rows: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._plan: dict[str, Any] | None = None
        self._state: RunState | None = None
        self._before = RunState(0)  # of phases before the steps

    @property
    def _phases(self) -> RunState:
        return self._state or self._before

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the current part of the work where it changes, and a few times inside it."""
        begins = self._phases.phase(name, done, total)
        if begins or not total or done == total or done % max(1, total // 10) == 0:
            self._write()

    def message(self, text: str) -> None:
        """Show a line that stays."""
        self._messages.append(text)
        self._write()

    def plan(self, plan: dict[str, Any]) -> None:
        """Show the settings with their reasons, folded."""
        settings, reasons = plan.get("settings") or {}, plan.get("reasons") or {}
        memory = plan.get("memory") or {}
        self._plan = plan
        rows = [(key, format_value(value), str(reasons.get(key, ""))) for key, value in settings.items()]
        peak = f"plan: peak {format_bytes(memory.get('peak_bytes'))} of {format_bytes(memory.get('budget_bytes'))}"
        table = _table(("setting", "value", "why"), rows)
        self._tables.append(f"<details><summary>{escape(peak)}</summary>{table}</details>")
        self._write()

    def begin(self, total_steps: int, step: int) -> None:
        """Show the bar of steps."""
        self._state = RunState(total_steps, step, self._plan)
        self._write()

    def samples(self, best: dict[str, Any], worst: dict[str, Any]) -> None:
        """Show the completions of the highest and the lowest reward of a rollout, with the next of what is shown."""
        self._phases.show_samples(best, worst)

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a finished step."""
        self._phases.finish(metrics)
        self._rows.append(metrics)
        self._write()

    def end(self) -> None:
        """Show that no more steps come."""
        self._phases.phase("")
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
        if (state := self._state) is not None:
            parts += [_row(_steps(state)), _row(_curve(state)), _row(_memory(state))]
            rewards = (f"{name} {format_number(mean)}" for name, mean, _ in state.rewards())
            speeds = (f"{name} {speed:,.0f} tok/s" for name, _, speed in state.speeds() if speed is not None)
            parts.append(_row(escape("   ".join([*rewards, *speeds]))))
            parts += [_row(_sample(label, row)) for label, row in (("best", state.best), ("worst", state.worst)) if row]
        elif self._before.name:
            parts.append(_row(escape(_phase(self._before))))
        columns = [name for name in _COLUMNS if any(row.get(name) is not None for row in self._rows)]
        if columns:
            parts.append(_table(columns, [[format_number(row.get(name)) for name in columns] for row in self._rows]))
        return "\n".join([*parts, *self._tables[1:]])


def _phase(state: RunState) -> str:
    return f"{state.name} {state.done}/{state.done_of}" if state.done_of else state.name


def _steps(state: RunState) -> str:
    left = state.time_left()
    eta = "" if left is None else f", ETA {format_seconds(left)}{'' if state.measured else ', predicted'}"
    return (
        f'<progress value="{state.step}" max="{state.total}"></progress> '
        f"step {state.step}/{state.total}{eta} {escape(_phase(state))}"
    )


def _curve(state: RunState) -> str:
    """Return the curve as a small picture with its last value."""
    values = tuple(state.curve)
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = 22 / (high - low) if high > low else 0.0
    points = " ".join(f"{200 * i / (len(values) - 1):.1f},{23 - (v - low) * scale:.1f}" for i, v in enumerate(values))
    return (
        f'<svg width="200" height="24" style="vertical-align:middle"><polyline points="{points}" fill="none" '
        f'stroke="currentColor" stroke-width="1.3"/></svg> {"reward" if state.samples else "loss"} {values[-1]:.3f}'
    )


def _memory(state: RunState) -> str:
    if state.peak is None or not state.card_bytes:
        return ""
    planned = f", planned {state.planned_peak / GIB:.2f}" if state.planned_peak else ""
    said = f"peak {state.peak / GIB:.2f} of {state.card_bytes / GIB:.2f} GiB{planned}"
    return f'<meter value="{state.peak / state.card_bytes:.4f}"></meter> {said}'


def _sample(label: str, row: dict[str, Any]) -> str:
    texts = [shortened(row[key], _SAMPLE // (1 + (key == "prompt"))) for key in ("prompt", "completion")]
    return f"{label} <b>{format_number(row['reward'])}</b> " + " &rarr; ".join(map(escape, texts))


def _row(content: str) -> str:
    return f'<div style="{_ROW}">{content}&nbsp;</div>'


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(str(one))}</th>" for one in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(one))}</td>" for one in row) + "</tr>" for row in rows)
    return f'<table style="text-align:left"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
