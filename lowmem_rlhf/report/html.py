"""report.html: one file that shows a run and needs no network. All that comes from the run is escaped."""

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from lowmem_rlhf.display.format import (
    evaluated_on,
    evaluation_table,
    format_bytes,
    format_measure,
    format_number,
    format_seconds,
    format_value,
    in_words,
    number,
    with_interval,
)
from lowmem_rlhf.display.outcome import about, outcome_rows
from lowmem_rlhf.files import atomic_write, writing
from lowmem_rlhf.paths import without_home
from lowmem_rlhf.recipe.secrets import masked
from lowmem_rlhf.report.plots import draw_run, to_png
from lowmem_rlhf.run.directory import RECIPE, REPORT, RunDirectory
from lowmem_rlhf.run.evaluations import read_evaluations
from lowmem_rlhf.run.held_out import AFTER, BEFORE, BEST, STOPPED, during, headline, part

_SAMPLES = 12  # the last ones shown
_LATER = 3  # evaluations shown, the newest first
_COLORS = ("#2f6fb0", "#d9822b", "#2c8a5b", "#b83a4b", "#7658a6", "#3b9aa8", "#8a6d3b", "#6b7785", "#c46fa0", "#94a835")

_CSS = """
:root { --ink: #22303c; --muted: #6b7785; --line: #e3e7eb; --soft: #f6f8fa; --blue: #2f6fb0; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 0 0 12px; }
p { margin: 0 0 10px; }
section { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 18px;
  overflow-x: auto; }
.muted { color: var(--muted); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 16px; }
.card { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 10px 16px; min-width: 130px; }
.card b { display: block; font-size: 20px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; font-size: 13px; }
td.num { font-variant-numeric: tabular-nums; }
td:first-child, code { font-family: ui-monospace, Consolas, monospace; font-size: 13px; }
img { width: 100%; height: auto; }
pre { margin: 0; padding: 10px 12px; background: var(--soft); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, Consolas, monospace; }
.sample { border-top: 1px solid var(--line); padding: 12px 0; }
.sample:first-of-type { border-top: 0; }
.tag { display: inline-block; background: #e8f0f8; color: var(--blue); border-radius: 5px; padding: 0 7px;
  margin: 0 6px 6px 0; font-size: 13px; }
.bar { display: flex; position: relative; height: 18px; background: var(--soft); border-radius: 4px; overflow: hidden;
  min-width: 340px; }
.bar i { height: 100%; }
.bar u { position: absolute; top: 0; bottom: 0; width: 2px; background: var(--ink); }
.key { display: inline-block; margin: 8px 14px 0 0; font-size: 13px; color: var(--muted); }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.yes { color: #2c8a5b; } .no { color: #b83a4b; }
"""


def write_report(run: RunDirectory) -> Path:
    """Write the run's ``report.html`` from what the run has so far, and return its path.

    Raises:
        UserError: a file of the run cannot be read.
        RunError: the report cannot be written.
    """
    metrics, evaluation, plan, recipe = run.metrics(), run.evaluation(), run.plan(), run.recipe_values()
    name = str(recipe.get("name") or run.path.name)
    image = base64.b64encode(to_png(draw_run(metrics, evaluation), dpi=130)).decode("ascii")
    sections = [
        _section("Held-out evaluation", _evaluation(evaluation)),
        *(_section("Evaluated later", _later(one)) for one in read_evaluations(run.path)[: -_LATER - 1 : -1]),
        _section("Training", f'<img alt="Curves of the run" src="data:image/png;base64,{image}">'),
        _section("Plan", _plan(plan)),
        _section("Memory", _memory(plan.get("memory") or {})),
        _section("Last samples", "".join(map(_sample, run.samples()[-_SAMPLES:])) or _none("no samples yet")),
        _section("Recipe", f"<pre>{escape((run.path / RECIPE).read_text(encoding='utf-8'))}</pre>"),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The browser itself then refuses anything that is not in this file.
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; """
        """style-src 'unsafe-inline'">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n"""
        f"<title>{escape(name)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{_header(name, recipe, metrics, evaluation)}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )
    path = run.path / REPORT
    with writing(path, remedy="then write it with `lowmem-rlhf report RUN`"):
        atomic_write(path, masked(without_home(page)))
    return path


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _none(text: str) -> str:
    return f'<p class="muted">{escape(text)}</p>'


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table of escaped text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f'<td class="num">{escape(str(c))}</td>' for c in row) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _header(name: str, recipe: dict[str, Any], metrics: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    seconds = sum(number(row.get("time/step")) or 0.0 for row in metrics)
    peak = max((p for row in metrics if (p := number(row.get("memory/peak_bytes"))) is not None), default=None)
    last = metrics[-1] if metrics else {}
    cards = [
        ("steps", format_number(last.get("step", 0))),
        ("last reward", format_number(last.get("reward/mean"))),
        ("training time", format_seconds(seconds)),
        ("peak memory", format_bytes(peak)),
    ]
    name = headline(evaluation)
    ends = [number(part(evaluation, when).get(name)) for when in (BEFORE, AFTER)]
    if any(value is not None for value in ends):
        shown = " → ".join("?" if value is None else format_measure(name, value) for value in ends)
        cards.insert(0, (f"held-out {in_words(name)}", shown))
    boxes = "".join(
        f'<div class="card"><span class="muted">{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in cards
    )
    about = f"{recipe.get('algorithm', '')} · {recipe.get('model', '')}".strip(" ·")
    description = str(recipe.get("description") or "").strip()
    return (
        f'<h1>{escape(name)}</h1>\n<p class="muted">{escape(about)}</p>\n'
        f'{f"<p>{escape(description)}</p>" if description else ""}\n<div class="cards">{boxes}</div>'
    )


def _evaluation(evaluation: dict[str, Any]) -> str:
    (_, *head), rows = evaluation_table(evaluation)
    if not rows:
        return _none("no held-out evaluation yet")
    notes = [evaluated_on(evaluation), str(evaluation.get(STOPPED) or "")]
    return _table(("", *head), rows) + _during(evaluation) + "".join(_none(note) for note in notes if note)


def _during(evaluation: dict[str, Any]) -> str:
    """Return the folded table of evaluations while the run went on: the headline of each."""
    name, best = headline(evaluation), part(evaluation, BEST).get("step")
    rows = [
        (f"step {row['step']}", with_interval(row, name) + (", the best" if row["step"] == best else ""))
        for row in during(evaluation)
    ]
    if not rows:
        return ""
    table = _table(("after", in_words(name)), rows)
    return f"<details><summary>{len(rows)} evaluations while it trained</summary>{table}</details>"


def _later(outcome: dict[str, Any]) -> str:
    """Return the table of one outcome of `eval`."""
    head, rows = outcome_rows(outcome)
    return _table(head, rows) + _none(about(outcome)) + _none(f"{outcome.get('made', '')}; {outcome.get('method', '')}")


def _plan(plan: dict[str, Any]) -> str:
    if not plan:
        return _none("no plan was saved")
    device, reasons = plan.get("device") or {}, plan.get("reasons") or {}
    about = f"{device.get('name', 'unknown device')}, {format_bytes(device.get('free_bytes'))} free of "
    about += f"{format_bytes(device.get('total_bytes'))}, profile {plan.get('profile') or 'none'}"
    rows = ((k, format_value(v), reasons.get(k, "")) for k, v in (plan.get("settings") or {}).items())
    return f"<p>{escape(about)}</p>" + _table(("setting", "value", "why"), rows)


def _memory(memory: dict[str, Any]) -> str:
    """Draw one bar a phase, its components side by side, on the scale of the budget (the dark mark)."""
    phases = {phase: {k: number(v) or 0.0 for k, v in parts.items()} for phase, parts in _phases(memory).items()}
    if not phases:
        return _none("no memory was planned")
    budget, peak = number(memory.get("budget_bytes")), number(memory.get("peak_bytes"))
    scale = max([budget or 0.0, *(sum(parts.values()) for parts in phases.values())]) or 1.0
    names = list(dict.fromkeys(name for parts in phases.values() for name in parts))
    color = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}
    mark = f'<u style="left:calc({100 * budget / scale:.2f}% - 2px)"></u>' if budget else ""
    rows = ""
    for phase, parts in phases.items():
        pieces = "".join(
            f'<i style="width:{100 * size / scale:.2f}%;background:{color[name]}" '
            f'title="{escape(name)}: {format_bytes(size)}"></i>'
            for name, size in parts.items()
        )
        size = format_bytes(sum(parts.values()))
        rows += f'<tr><td>{escape(phase)}</td><td class="num">{size}</td>'
        rows += f'<td><div class="bar">{pieces}{mark}</div></td></tr>\n'
    keys = "".join(f'<span class="key"><i style="background:{color[n]}"></i>{escape(n)}</span>' for n in names)
    details = _table(
        ("component", *phases), ((n, *(format_bytes(p[n]) if n in p else "" for p in phases.values())) for n in names)
    )
    fits = "" if budget is None or peak is None else "yes" if peak <= budget else "no"
    return (
        f'<p class="{fits}">peak {format_bytes(peak)} of a budget of {format_bytes(budget)}</p>'
        f"<table>\n<tr><th>phase</th><th>bytes</th><th>components (dark mark: the budget)</th></tr>\n{rows}</table>"
        f"<div>{keys}</div><details><summary>Components in numbers</summary>{details}</details>"
    )


def _phases(memory: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(phase): parts for phase, parts in (memory.get("phases") or {}).items() if isinstance(parts, dict)}


def _sample(sample: dict[str, Any]) -> str:
    """Return one sample: its prompt, completion, and every other value as a tag."""
    rewards = sample.get("rewards") or {}
    tags = [f"{name} {format_number(value)}" for name, value in rewards.items()] if isinstance(rewards, dict) else []
    hidden = ("step", "prompt", "completion", "rewards")
    tags += [f"{key} {_text(value)}" for key, value in sample.items() if key not in hidden]
    shown = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags)
    return (
        f'<div class="sample"><p><b>step {escape(str(sample.get("step", "?")))}</b></p>'
        f'<p class="muted">prompt</p><pre>{escape(_text(sample.get("prompt", "")))}</pre>'
        f'<p class="muted">completion</p><pre>{escape(_text(sample.get("completion", "")))}</pre><p>{shown}</p></div>'
    )


def _text(value: Any) -> str:
    """Return text as it is, chat messages as ``role: content``, numbers shortly, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n".join(f"{m.get('role', '')}: {_text(m['content'])}" for m in value)
    return format_number(value) if number(value) is not None else json.dumps(value, ensure_ascii=False)
