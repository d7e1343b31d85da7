"""Pictures of a run, drawn from ``metrics.jsonl`` and ``evaluation.json``.

matplotlib is imported when a picture is drawn, and used through its objects: no pyplot, no global state, no display.
"""

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.display.format import number
from lowmem_rlhf.files import atomic_write, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]
INK, GRID, MUTED = "#22303c", "#e3e7eb", "#6b7785"
BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6fb0", "#d9822b", "#2c8a5b", "#b83a4b", "#7658a6"
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
    """Write one small picture, 900 x 450 pixels: the reward curve and the held-out accuracy before and after.

    Of a run that learns from given texts it is the loss.
    """
    figure = _figure(5.625, 2.8125)
    axes = figure.add_subplot()
    _main(axes, metrics, evaluation)
    axes.set_title(title, **_TITLE, pad=19)
    return _write(figure, path, dpi=160)


def draw_run(metrics: Rows, evaluation: dict[str, Any]) -> "Figure":
    """Return the picture of a whole run: reward or loss, then what else it recorded, gradient norm and time."""
    panels = [p for p in PANELS if any(map(math.isfinite, [*_series(metrics, p[1][0]), *_series(metrics, p[2][0])]))]
    tasks = task_names(metrics)
    rows = (len(panels) + 3 + bool(tasks)) // 2
    figure = _figure(9.0, 3.2 + 2.5 * rows)
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=(1.35, *[1] * rows))
    main = figure.add_subplot(grid[0, :])
    main.set_title("Loss" if _supervised(metrics) else "Reward", **_TITLE, pad=19)
    _main(main, metrics, evaluation)
    places = [figure.add_subplot(grid[1 + i // 2, i % 2]) for i in range(len(panels) + 2 + bool(tasks))]
    if tasks:
        _tasks(places.pop(0), metrics, tasks)
    for axes, (title, left, right) in zip(places, panels, strict=False):
        axes.set_title(title, **_TITLE)
        _two_scales(axes, metrics, left, right)
    norm, times = places[-2:]
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
        turns = [row for row in metrics if number(row.get(key)) is not None]
        values = _series(turns, key)
        marker = "o" if len(turns) < 3 else None
        axes.plot(_steps(turns), smooth(values, max(3, len(values) // 12)), color=color, marker=marker, label=task)
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


def _series(metrics: Rows, key: str) -> list[float]:
    """Return one value a row, NaN (a gap in the line) where it is missing or null."""
    return [math.nan if (value := number(row.get(key))) is None else value for row in metrics]


def _steps(metrics: Rows) -> list[float]:
    return [index if (step := number(row.get("step"))) is None else step for index, row in enumerate(metrics, 1)]


def style_axes(axes: "Axes") -> None:
    """Give axes the grid, ticks and spines of all our plots."""
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c3cad1")


def _style(axes: "Axes", metrics: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    style_axes(axes)
    axes.set_xlabel("step", fontsize=8, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    steps = _steps(metrics) or [0.0, 1.0]
    first, last = min(0.0, *steps), max(1.0, *steps)
    axes.set_xlim(first - 0.02 * (last - first), last + 0.03 * (last - first))


def _line(axes: "Axes", metrics: Rows, key: str, color: str, **options: Any) -> bool:
    """Draw one metric; say so where nothing was recorded."""
    values = _series(metrics, key)
    points = sum(map(math.isfinite, values))
    if not points:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
        return False
    options = {"linewidth": 1.4, "marker": "o" if points < 3 else None, "markersize": 3, **options}
    axes.plot(_steps(metrics), values, color=color, **options)
    return True


def _supervised(metrics: Rows) -> bool:
    """Whether a run learned from given texts: it has losses and no rewards."""
    return any("loss" in row for row in metrics) and not any("reward/mean" in row for row in metrics)


def _main(axes: "Axes", metrics: Rows, evaluation: dict[str, Any]) -> None:
    (_loss if _supervised(metrics) else _reward)(axes, metrics, evaluation)


def _loss(axes: "Axes", metrics: Rows, evaluation: dict[str, Any]) -> None:
    _style(axes, metrics)
    _line(axes, metrics, "loss", BLUE, label="training loss")
    last = max(_steps(metrics), default=1.0)
    points = [(0.0, (evaluation.get("before") or {}).get("loss"))]
    points += zip(_steps(metrics), _series(metrics, "eval/loss"), strict=True)
    points += [(last, (evaluation.get("after") or {}).get("loss"))]
    shown = [(x, y) for x, value in points if (y := number(value)) is not None]
    if shown:
        axes.plot(*zip(*shown, strict=True), "D-", color=ORANGE, markersize=5, linewidth=1, label="held-out loss")
    axes.set_ylabel("loss", fontsize=8, color=BLUE)
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper right", labelcolor=MUTED)


def _reward(axes: "Axes", metrics: Rows, evaluation: dict[str, Any]) -> None:
    _style(axes, metrics)
    mean, spread, steps = _series(metrics, "reward/mean"), _series(metrics, "reward/std"), _steps(metrics)
    window = max(3, len(mean) // 12)
    if _line(axes, metrics, "reward/mean", BLUE, alpha=0.35, linewidth=0.9, label="mean of a step"):
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        if any(map(math.isfinite, low)):
            smooth_low, smooth_high = smooth(low, window), smooth(high, window)
            axes.fill_between(steps, smooth_low, smooth_high, color=BLUE, alpha=0.12, linewidth=0, label="± std")
        if len(mean) > 3:
            axes.plot(steps, smooth(mean, window), color=BLUE, linewidth=2, label="smoothed")
    axes.set_ylabel("training reward", fontsize=8, color=BLUE)
    finite = [value for value in mean if math.isfinite(value)]
    bounded = not finite or (min(finite) >= 0 and max(finite) <= 1)
    marks = _accuracy(axes, metrics, evaluation, shared=bounded)
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


def _accuracy(axes: "Axes", metrics: Rows, evaluation: dict[str, Any], shared: bool) -> "Axes | None":
    """Mark the held-out accuracy before (at step 0) and after; on an axis of its own where rewards leave [0, 1].

    Where nothing counts as correct, as with a reward that is a probability, or accuracy is far from the reward that is
    learned, it is the mean held-out reward.
    """
    parts = {when: evaluation.get(when) or {} for when in ("before", "after")}
    low, high = axes.get_ylim()
    found = [y for part in parts.values() if (y := number(part.get("accuracy")))]
    correct = any(not shared or low <= y <= high for y in found) or (
        bool(found) and not any(number(part.get("reward/mean")) for part in parts.values())
    )
    key, form = ("accuracy", "{:.1%}") if correct else ("reward/mean", "{:.3g}")
    values = {when: y for when, part in parts.items() if (y := number(part.get(key))) is not None}
    if not values:
        return None
    target, last = axes, max(_steps(metrics), default=1.0)
    if not correct:
        pass  # of the axes' own kind, whatever its range
    elif shared:
        low = min(low, min(values.values()) - 0.05)
        axes.set_ylim(max(low, -0.05), min(max(high, 1.15 * max(values.values())), 1.05))
    else:
        target = axes.twinx()
        _right_axis(target, "held-out accuracy", ORANGE)
        target.set_ylim(-0.05, 1.05)
    problems = next((part["problems"] for part in parts.values() if number(part.get("problems"))), None)
    label = f"held-out {'accuracy' if correct else 'reward'}" + (f" ({problems} problems)" if problems else "")
    places = [0.0 if when == "before" else last for when in values]
    target.plot(places, list(values.values()), "D", color=ORANGE, markersize=6, label=label, zorder=5)
    if "before" in values:
        target.hlines(values["before"], 0, last, color=ORANGE, linewidth=0.9, linestyle=(0, (2, 3)))
    ends = [v for v in _series(metrics, "reward/mean") if math.isfinite(v)] or [0.0]
    low, high = target.get_ylim()
    texts = {when: f"{when} {form.format(value)}" for when, value in values.items()}
    _value(target, 0.0, values.get("before"), texts, below=values.get("before", 0.0) - low > 0.1 * (high - low))
    _value(target, last, values.get("after"), texts, below=not shared or values.get("after", 0.0) <= ends[-1])
    return target


def _value(axes: "Axes", x: float, y: float | None, texts: dict[str, str], below: bool) -> None:
    """Write a marker's value beside it, with a white rim so that it can be read on a curve; the first one at step 0."""
    if y is None:
        return
    from matplotlib.patheffects import withStroke

    right = x == 0
    axes.annotate(
        texts["before" if right else "after"], (x, y), xytext=(8 if right else -8, -13 if below else 5),
        textcoords="offset points",
        fontsize=8, fontweight="bold", color="#a85e14", ha="left" if right else "right", zorder=6,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )  # fmt: skip


def _right_axis(axes: "Axes", label: str, color: str) -> None:
    axes.set_ylabel(label, fontsize=8, color=color)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _two_scales(axes: "Axes", metrics: Rows, left: tuple[str, str, str], right: tuple[str, str, str]) -> None:
    """Draw two metrics over the same steps, each against its own axis (KEY, LABEL, COLOUR)."""
    _style(axes, metrics)
    axes.set_ylabel(left[1], fontsize=8, color=left[2])
    if _line(axes, metrics, left[0], left[2]):
        _from_zero(axes, _series(metrics, left[0]))
    if any(map(math.isfinite, _series(metrics, right[0]))):
        other = axes.twinx()
        _line(other, metrics, right[0], right[2], linestyle="--")
        _right_axis(other, right[1], right[2])
        _from_zero(other, _series(metrics, right[0]))
        if right[0] == "completion/truncated":
            other.set_ylim(0, 1.02)


def _from_zero(axes: "Axes", values: list[float]) -> None:
    if min(value for value in values if math.isfinite(value)) >= 0:
        axes.set_ylim(bottom=0)


def _times(axes: "Axes", metrics: Rows) -> None:
    _style(axes, metrics)
    stacks = [[0.0 if math.isnan(v) else v for v in _series(metrics, f"time/{name}")] for name, _ in PHASES]
    if not any(map(any, stacks)):
        _line(axes, metrics, "time/step", MUTED)
        return
    names, colors = zip(*PHASES, strict=True)
    below = [0.0] * len(metrics)
    for name, color, values in zip(names, colors, stacks, strict=True):
        axes.bar(_steps(metrics), values, width=1.0, bottom=below, color=color, alpha=0.85, linewidth=0, label=name)
        below = [b + v for b, v in zip(below, values, strict=True)]
    _line(axes, metrics, "time/step", INK, linewidth=0.8, label="whole step")
    axes.set_ylim(0, 1.3 * max([*below, *(t for t in _series(metrics, "time/step") if math.isfinite(t))]))
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="upper right", labelcolor=MUTED, handlelength=1.2)
