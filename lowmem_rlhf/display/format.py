"""Numbers as people read them; shared by the live view, the tables and report.html."""

import math
from typing import Any


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else (a missing metric, null, text)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def format_number(value: Any) -> str:
    """Return three significant digits, and whole numbers as they are."""
    got = number(value)
    if got is None:
        return "-"
    if got == int(got) and abs(got) < 1e9:
        return f"{int(got):,}"
    return f"{got:,.0f}" if abs(got) >= 1000 else f"{got:.3g}"


def format_value(value: Any) -> str:
    """Return a setting's value as a recipe would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return ", ".join(f"{key}={format_value(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item) for item in value)
    return "none" if value is None else str(value)


def format_bytes(value: Any) -> str:
    """Return GiB (2**30 bytes, what card makers call GB), or MiB below a tenth of one."""
    got = number(value)
    if got is None:
        return "-"
    return f"{got / 2**30:.2f} GiB" if abs(got) >= 0.1 * 2**30 else f"{got / 2**20:.0f} MiB"


def format_seconds(value: Any) -> str:
    """Return ``45s``, ``2m10s`` or ``3h05m``."""
    got = number(value)
    if got is None:
        return "-"
    seconds = round(got)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def format_ratio(before: Any, after: Any) -> str:
    """Return ``3.4x``, or a dash where a ratio says nothing (a missing, zero or negative number)."""
    first, second = number(before), number(after)
    return "-" if first is None or second is None or first <= 0 or second < 0 else f"{second / first:.3g}x"


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return ``(name, before, after)`` of every numeric result but the count of problems; accuracy comes first.

    Those of each task are behind ``TASK: ``.
    """
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    rows = _rows(before, after)
    tasks = [one.get("tasks") or {} for one in (before, after)]
    for task in dict.fromkeys([*tasks[0], *tasks[1]]):
        own = _rows(*(one.get(task) or {} for one in tasks))
        rows += [(f"{task}: {name}", *values) for name, *values in own]
    return rows


def _rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    numeric = {n for one in (before, after) for n in one if number(one[n]) is not None}
    names = [n for n in dict.fromkeys([*before, *after]) if n in numeric]
    names = [n for n in names if n not in ("problems", "samples", "temperature")]
    names.sort(key=lambda name: 0 if name == "accuracy" else 1 if name.startswith("reward/") else 2)
    return [(name, before.get(name), after.get(name)) for name in names]
