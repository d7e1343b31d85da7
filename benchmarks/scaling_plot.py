"""The picture of scaling.py: a panel for each factor, time above and peak below, a line for each phase."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.report.axes import INK, MUTED, style_axes
from lowmem_rlhf.report.plots import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(points: Sequence[dict[str, Any]], labels: dict[str, str], path: Path) -> Path:
    """Write the picture; its kind follows from the path's suffix.

    Args:
        points: what scaling.py measured.
        labels: of the factors that may be among them, in order.
    """
    from matplotlib.figure import Figure

    factors = [factor for factor in labels if any(point["factor"] == factor for point in points)]
    figure = Figure(figsize=(2.9 * len(factors) + 0.4, 4.6), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(factors), squeeze=False, sharex="col", sharey="row")
    for column, factor in enumerate(factors):
        own = [point for point in points if point["factor"] == factor]
        _panel(grid[0][column], own, factor, "seconds", 1.0)
        _panel(grid[1][column], own, factor, "peak_bytes", 1e-6)
        grid[1][column].set_xlabel(labels[factor], fontsize=8.5, color=INK)
    grid[0][0].set_ylabel("seconds", fontsize=8, color=MUTED)
    grid[1][0].set_ylabel("peak live MB", fontsize=8, color=MUTED)
    for row in grid:
        row[0].set_ylim(bottom=0)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=8, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _panel(axes: "Axes", points: Sequence[dict[str, Any]], factor: str, key: str, unit: float) -> None:
    """Draw one quantity of all phases over the factor's values, which are spaced by their logarithms."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    values = [point[factor] for point in points]
    for phase, color in PHASES:
        heights = [point[key][phase] * unit for point in points]
        axes.plot(values, heights, color=color, linewidth=1.5, marker="o", markersize=3.5, label=phase)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    style_axes(axes)
