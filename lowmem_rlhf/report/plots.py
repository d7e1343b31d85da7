"""Pictures of a run, drawn from ``metrics.jsonl`` and ``evaluation.json``.

matplotlib is imported when a picture is drawn, and used through its objects: no pyplot, no global state, no display.
"""

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.files import atomic_write, writing
from lowmem_rlhf.report.axes import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    Rows,
    right_axis,
    series_of,
    steps_of,
    style_axes,
)
from lowmem_rlhf.report.held_out_marks import Point, draw_marks, mark_beside_rewards, points_of
from lowmem_rlhf.run.held_out import LOSS, PREFIX, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = (("rollout", BLUE), ("score", ORANGE), ("update", GREEN))


# (title, what is drawn against the left axis, against the right axis), for the metrics that a run has
PANELS: tuple[tuple[str, tuple[str, str, str], tuple[str, str, str]], ...] = (
    (
        "Completions",
        ("completion/mean_length", "mean length (tokens)", BLUE),
        ("completion/truncated", "truncated share", ORANGE),
    ),
    ("KL and entropy", ("kl", "KL to the reference", PURPLE), ("entropy", "entropy", GREEN)),
    ("Critic", ("value/explained_variance", "explained variance", BLUE), ("value/loss", "value loss", ORANGE)),
    ("Policy update", ("policy/approx_kl", "approx. KL", PURPLE), ("policy/clip_fraction", "clip fraction", GREEN)),
    ("Pairs", ("accuracy", "pairs in the right order", BLUE), ("score/margin", "score margin", ORANGE)),
)


def plot_reward(metrics: Rows, evaluation: dict[str, Any], path: str | Path, title: str = "") -> Path:
    """Write one small picture, 900 x 450 pixels: the reward curve and the held-out headline at each evaluation.

    Of a run that learns from given texts it is the loss.
    """
    figure = _figure(5.625, 2.8125)
    axes = figure.add_subplot()
    _main(axes, metrics, evaluation)
    axes.set_title(title, **_TITLE, pad=19)
    return _write(figure, path, dpi=160)


def draw_run(metrics: Rows, evaluation: dict[str, Any]) -> "Figure":
    """Return the picture of a whole run: reward or loss, then what else it recorded, gradient norm and time."""
    panels = [p for p in PANELS if any(math.isfinite(v) for one in p[1:] for v in series_of(metrics, one[0]))]
    tasks, name, points = task_names(metrics), headline(evaluation), list[Point]()
    if _supervised(metrics) and name != LOSS:  # which has no place beside the losses
        points = points_of(metrics, evaluation, name)
    curve = len(points) > 2  # two are a matter for the table
    rows = (len(panels) + curve + bool(tasks) + 3) // 2
    figure = _figure(9.0, 3.2 + 2.5 * rows)
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=(1.35, *[1] * rows))
    main = figure.add_subplot(grid[0, :])
    main.set_title("Loss" if _supervised(metrics) else "Reward", **_TITLE, pad=19)
    _main(main, metrics, evaluation)
    places = [figure.add_subplot(grid[1 + i // 2, i % 2]) for i in range(len(panels) + bool(tasks) + curve + 2)]
    if tasks:
        _tasks(places.pop(0), metrics, tasks)
    for axes, (title, left, right) in zip(places, panels, strict=False):
        axes.set_title(title, **_TITLE)
        _two_scales(axes, metrics, left, right)
    norm, times = places[-2:]
    if curve:
        axes = places[len(panels)]
        axes.set_title(f"Held-out {name}", **_TITLE)
        _style(axes, metrics)
        draw_marks(axes, points, name)
    norm.set_title("Gradient norm", **_TITLE)
    _style(norm, metrics)
    if _line(norm, metrics, "grad_norm", RED):
        norm.set_ylim(bottom=0)
    times.set_title("Seconds a step", **_TITLE)
    _times(times, metrics)
    return figure


def task_names(metrics: Rows) -> list[str]:
    """Return the names of the tasks that the steps tell of, in the order of their first turn; none of a single one."""
    keys = dict.fromkeys(key for row in metrics for key in row if key.startswith("task/"))
    return [key.split("/")[1] for key in keys if key.endswith("/reward/mean")]


def _tasks(axes: "Axes", metrics: Rows, tasks: Sequence[str]) -> None:
    """Draw the mean reward of each task, smoothed."""
    axes.set_title("Reward by task", **_TITLE)
    _style(axes, metrics)
    for task, color in zip(tasks, itertools.cycle((BLUE, ORANGE, GREEN, RED, PURPLE)), strict=False):
        key = f"task/{task}/reward/mean"
        turns = [row for row in metrics if row.get(key) is not None]
        values = series_of(turns, key)
        marker = "o" if len(turns) < 3 else None
        axes.plot(steps_of(turns), smooth(values, max(3, len(values) // 12)), color=color, marker=marker, label=task)
    axes.legend(fontsize=7, frameon=False, ncols=3, loc="best", labelcolor=MUTED, handlelength=1.5)


def to_png(figure: "Figure", dpi: int) -> bytes:
    """Return the figure as PNG."""
    return _render(figure, "png", dpi)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the centred moving average, over fewer values at the ends; values that are not finite are left out."""
    result = []
    for index in range(len(values)):
        half = min(window // 2, index, len(values) - 1 - index)
        near = [v for v in values[index - half : index + half + 1] if math.isfinite(v)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


_TITLE: dict[str, Any] = {"fontsize": 9.5, "color": INK, "loc": "left", "fontweight": "bold"}


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _render(figure: "Figure", kind: str, dpi: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format=kind, dpi=dpi)
    return buffer.getvalue()


def _write(figure: "Figure", path: str | Path, dpi: int) -> Path:
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, _render(figure, path.suffix.lstrip(".") or "png", dpi))
    return path


def _style(axes: "Axes", metrics: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    style_axes(axes)
    axes.set_xlabel("step", fontsize=8, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    steps = steps_of(metrics) or [0.0, 1.0]
    first, last = min(0.0, *steps), max(1.0, *steps)
    axes.set_xlim(first - 0.02 * (last - first), last + 0.03 * (last - first))


def _line(axes: "Axes", metrics: Rows, key: str, color: str, **options: Any) -> bool:
    """Draw one metric; say so where nothing was recorded."""
    values = series_of(metrics, key)
    points = sum(map(math.isfinite, values))
    if not points:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
        return False
    options = {"linewidth": 1.4, "marker": "o" if points < 3 else None, "markersize": 3, **options}
    axes.plot(steps_of(metrics), values, color=color, **options)
    return True


def _supervised(metrics: Rows) -> bool:
    """Whether a run learned from given texts: it has losses and no rewards."""
    return any("loss" in row for row in metrics) and not any("reward/mean" in row for row in metrics)


def _main(axes: "Axes", metrics: Rows, evaluation: dict[str, Any]) -> None:
    (_loss if _supervised(metrics) else _reward)(axes, metrics, evaluation)


def _loss(axes: "Axes", metrics: Rows, evaluation: dict[str, Any]) -> None:
    _style(axes, metrics)
    _line(axes, metrics, "loss", BLUE, label="training loss")
    points = {one.step: one for one in points_of(metrics, evaluation, LOSS)}
    logged = zip(steps_of(metrics), series_of(metrics, f"{PREFIX}{LOSS}"), strict=True)
    points = {**{step: Point(step, value, None) for step, value in logged if math.isfinite(value)}, **points}
    if points:
        draw_marks(axes, [points[step] for step in sorted(points)], "held-out loss", line=True)
    axes.set_ylabel("loss", fontsize=8, color=BLUE)
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper right", labelcolor=MUTED)


def _reward(axes: "Axes", metrics: Rows, evaluation: dict[str, Any]) -> None:
    _style(axes, metrics)
    mean, spread, steps = series_of(metrics, "reward/mean"), series_of(metrics, "reward/std"), steps_of(metrics)
    window = max(3, len(mean) // 12)
    finite = [value for value in mean if math.isfinite(value)]
    bounded = not finite or (min(finite) >= 0 and max(finite) <= 1)
    if _line(axes, metrics, "reward/mean", BLUE, alpha=0.35, linewidth=0.9, label="mean of a step"):
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        if any(map(math.isfinite, low)):
            smooth_low, smooth_high = smooth(low, window), smooth(high, window)
            if bounded:  # rewards lie between 0 and 1, as far as their means tell, whatever a deviation says
                smooth_low = [max(value, 0.0) for value in smooth_low]  # what is not a number stays so
                smooth_high = [min(value, 1.0) for value in smooth_high]
            axes.fill_between(steps, smooth_low, smooth_high, color=BLUE, alpha=0.12, linewidth=0, label="± std")
        if len(mean) > 3:
            axes.plot(steps, smooth(mean, window), color=BLUE, linewidth=2, label="smoothed")
    axes.set_ylabel("training reward", fontsize=8, color=BLUE)
    marks = mark_beside_rewards(axes, metrics, evaluation, bounded)
    handles, labels = axes.get_legend_handles_labels()
    if marks is not None and marks is not axes:
        more = marks.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    if handles:
        # Above the axes, so that it never lies on a curve.
        axes.legend(
            handles, labels, fontsize=7, frameon=False, ncols=len(handles), loc="lower left",
            bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.1, columnspacing=1.2, handlelength=1.5, labelcolor=MUTED,
        )  # fmt: skip


def _two_scales(axes: "Axes", metrics: Rows, left: tuple[str, str, str], right: tuple[str, str, str]) -> None:
    """Draw two metrics over the same steps, each against its own axis (KEY, LABEL, COLOUR)."""
    _style(axes, metrics)
    axes.set_ylabel(left[1], fontsize=8, color=left[2])
    if _line(axes, metrics, left[0], left[2]):
        _from_zero(axes, series_of(metrics, left[0]))
    if any(map(math.isfinite, series_of(metrics, right[0]))):
        other = axes.twinx()
        _line(other, metrics, right[0], right[2], linestyle="--")
        right_axis(other, right[1], right[2])
        _from_zero(other, series_of(metrics, right[0]))
        if right[0] == "completion/truncated":
            other.set_ylim(0, 1.02)


def _from_zero(axes: "Axes", values: list[float]) -> None:
    if min(value for value in values if math.isfinite(value)) >= 0:
        axes.set_ylim(bottom=0)


def _times(axes: "Axes", metrics: Rows) -> None:
    _style(axes, metrics)
    stacks = [[0.0 if math.isnan(v) else v for v in series_of(metrics, f"time/{name}")] for name, _ in PHASES]
    if not any(map(any, stacks)):
        _line(axes, metrics, "time/step", MUTED)
        return
    names, colors = zip(*PHASES, strict=True)
    below = [0.0] * len(metrics)
    for name, color, values in zip(names, colors, stacks, strict=True):
        axes.bar(steps_of(metrics), values, width=1.0, bottom=below, color=color, alpha=0.85, linewidth=0, label=name)
        below = [b + v for b, v in zip(below, values, strict=True)]
    _line(axes, metrics, "time/step", INK, linewidth=0.8, label="whole step")
    axes.set_ylim(0, 1.3 * max([*below, *(t for t in series_of(metrics, "time/step") if math.isfinite(t))]))
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="upper right", labelcolor=MUTED, handlelength=1.2)
