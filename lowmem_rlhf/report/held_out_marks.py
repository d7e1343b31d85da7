"""The held-out evaluations of a run in its pictures: a mark each, with its interval."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lowmem_rlhf.display.format import format_measure, interval_of, number
from lowmem_rlhf.report.axes import ORANGE, Rows, right_axis, series_of, steps_of
from lowmem_rlhf.run.held_out import ACCURACY, AFTER, BEFORE, MEAN_REWARD, during, headline, part, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Point(NamedTuple):
    """A measure of an evaluation; its interval is None where nobody tells."""

    step: float
    value: float
    interval: tuple[float, float] | None


def points_of(metrics: Rows, evaluation: dict[str, Any], name: str) -> list[Point]:
    """Return what the evaluations found of a measure, in their order; that after the last step stands there once."""
    last = max(steps_of(metrics), default=1.0)
    rows = [(0.0, part(evaluation, BEFORE)), *((float(row["step"]), row) for row in during(evaluation))]
    if after := part(evaluation, AFTER):
        rows = [*(one for one in rows if one[0] != last), (last, after)]
    found = ((step, number(row.get(name)), interval_of(row, name)) for step, row in rows)
    return [Point(step, value, interval) for step, value, interval in found if value is not None]


def draw_marks(axes: "Axes", points: Sequence[Point], label: str, line: bool = False) -> None:
    """Mark points with their intervals; a line joins more than two, or any if it is asked for."""
    at, values = [one.step for one in points], [one.value for one in points]
    joined = line or len(points) > 2
    axes.plot(
        at, values, "D-" if joined else "D", color=ORANGE, markersize=4 if len(points) > 2 else 6, linewidth=1,
        label=label, zorder=5,
    )  # fmt: skip
    if known := [(one, one.interval) for one in points if one.interval is not None]:
        lengths = [
            [max(0.0, one.value - low) for one, (low, _) in known],
            [max(0.0, high - one.value) for one, (_, high) in known],
        ]
        axes.errorbar(
            [one.step for one, _ in known], [one.value for one, _ in known], lengths,
            fmt="none", ecolor=ORANGE, elinewidth=0.9, capsize=2, alpha=0.7, zorder=4,
        )  # fmt: skip


def mark_beside_rewards(axes: "Axes", metrics: Rows, evaluation: dict[str, Any], shared: bool) -> "Axes | None":
    """Mark the headline of each evaluation beside the curve of rewards; return the axes that it is drawn on.

    Args:
        shared: the rewards lie in [0, 1], so that an accuracy needs no axis of its own. What is no reward always has.
    """
    name = _drawn(axes, evaluation, shared)
    points = points_of(metrics, evaluation, name)
    if not points:
        return None
    target, values = axes, [one.value for one in points]
    if name == ACCURACY and shared:
        low, high = axes.get_ylim()
        top = max(one.interval[1] + 0.02 if one.interval else 1.15 * one.value for one in points)
        axes.set_ylim(max(min(low, min(values) - 0.05), -0.05), min(max(high, top), 1.05))
    elif not name.startswith("reward/"):
        target = axes.twinx()
        right_axis(target, f"held-out {name}", ORANGE)
        if name == ACCURACY:
            target.set_ylim(-0.05, 1.05)
    problems = next((n for row in rows_of(evaluation) if (n := row.get("problems")) and number(n)), None)
    words = "reward" if name == MEAN_REWARD else name
    draw_marks(target, points, f"held-out {words}" + (f" ({problems} problems)" if problems else ""))
    _write_ends(target, metrics, points, name, shared, ended=bool(part(evaluation, AFTER)))
    return target


def _write_ends(axes: "Axes", metrics: Rows, points: Sequence[Point], name: str, shared: bool, ended: bool) -> None:
    """Write the values before (with a line across) and after beside their marks."""
    first, last = points[0], points[-1]
    curve = [value for value in series_of(metrics, "reward/mean") if math.isfinite(value)] or [0.0]
    low, high = axes.get_ylim()
    if first.step == 0:
        end = max(steps_of(metrics), default=1.0)
        axes.hlines(first.value, 0, end, color=ORANGE, linewidth=0.9, linestyle=(0, (2, 3)))
        text = f"before {format_measure(name, first.value)}"
        _value(axes, first, text, below=first.value - low > 0.1 * (high - low))
    if ended and last.step > 0:
        _value(axes, last, f"after {format_measure(name, last.value)}", below=not shared or last.value <= curve[-1])


def _drawn(axes: "Axes", evaluation: dict[str, Any], shared: bool) -> str:
    """Return the measure that is drawn beside the rewards: the headline.

    Of a run of an older version, which names none, it is the mean held-out reward where the accuracy is far from the
    reward that is learned.
    """
    name, rows = headline(evaluation), rows_of(evaluation)
    if name != ACCURACY or any("headline" in row for row in rows):
        return name
    low, high = axes.get_ylim()
    near = not shared or any(low <= y <= high for row in rows if (y := number(row.get(ACCURACY))))
    return ACCURACY if near or not any(number(row.get(MEAN_REWARD)) for row in rows) else MEAN_REWARD


def _value(axes: "Axes", point: Point, text: str, below: bool) -> None:
    """Write a marker's value beside it, with a white rim so that it can be read on a curve; the first one at step 0."""
    from matplotlib.patheffects import withStroke

    right = point.step == 0
    axes.annotate(
        text, (point.step, point.value), xytext=(8 if right else -8, -13 if below else 5),
        textcoords="offset points",
        fontsize=8, fontweight="bold", color="#a85e14", ha="left" if right else "right", zorder=6,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )  # fmt: skip
