"""Numbers as people read them; shared by the live view, the tables and report.html."""

from typing import Any

from lowmem_rlhf.run.held_out import (
    ACCURACY,
    AFTER,
    BEFORE,
    BEST,
    MEAN_REWARD,
    during,
    headline,
    measures,
    number,
    part,
    with_tasks,
)

__all__ = ["GIB", "number"]

GIB = 2**30


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
    return f"{got / GIB:.2f} GiB" if abs(got) >= 0.1 * GIB else f"{got / 2**20:.0f} MiB"


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


def in_words(measure: str) -> str:
    """Return what sentences call a measure of an evaluation."""
    return "mean reward" if measure == MEAN_REWARD else measure


def format_measure(name: str, value: Any) -> str:
    """Return a measure as a headline shows it: an accuracy in percent."""
    got = number(value)
    return "-" if got is None else f"{got:.1%}" if name.rpartition("/")[2] == ACCURACY else format_number(got)


def interval_of(row: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Return between which bounds a measure of an evaluation's row lies; None where nobody tells."""
    bounds = part(row, "intervals").get(name)
    low, high = map(number, bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
    return None if low is None or high is None else (low, high)


def with_interval(row: dict[str, Any], name: str) -> str:
    """Return a measure of an evaluation's row with its interval, ``0.055 [0.027, 0.109]``."""
    bounds = interval_of(row, name)
    text = format_number(row.get(name))
    return text if bounds is None else f"{text} [{format_number(bounds[0])}, {format_number(bounds[1])}]"


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return ``(name, before, after)`` of every numeric result but the counts; the headline comes first.

    Those of each task come last, behind ``TASK: ``.
    """
    before, after = (with_tasks(part(evaluation, when)) for when in (BEFORE, AFTER))
    names, first = list(measures(before) | measures(after)), (headline(evaluation), ACCURACY)

    def place(name: str) -> int:
        return first.index(name) if name in first else 2 if name.startswith("reward/") else 4 if ": " in name else 3

    names.sort(key=place)
    return [(name, before.get(name), after.get(name)) for name in names]


def evaluated_on(evaluation: dict[str, Any]) -> str:
    """Return how many problems the held-out results are of, and what their intervals are; empty where nobody tells."""
    ends = [part(evaluation, when) for when in (BEFORE, AFTER)]
    count = next((n for end in ends if (n := number(end.get("problems")))), None)
    intervals = ", 95 % intervals over them in brackets" if any(end.get("intervals") for end in ends) else ""
    return f"{format_number(count)} held-out problems{intervals}" if count else ""


def evaluation_table(evaluation: dict[str, Any], ratio: bool = True) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return head and rows of the table of held-out results, each with its interval; no rows where there are none.

    Args:
        ratio: how many times the first is the last, too.
    """
    columns = {when: with_tasks(part(evaluation, when)) for when in (BEFORE, AFTER)}
    step = part(evaluation, BEST).get("step")
    best = next((row for row in during(evaluation) if row["step"] == step), None)
    if best is not None and best["step"] != columns[AFTER].get("step"):
        columns = {BEFORE: columns[BEFORE], f"best, step {step}": with_tasks(best), AFTER: columns[AFTER]}
    rows = [
        (name, *(with_interval(row, name) for row in columns.values()), *([format_ratio(first, last)] if ratio else []))
        for name, first, last in evaluation_rows(evaluation)
    ]
    return ["held-out", *columns, *(["ratio"] if ratio else [])], rows
