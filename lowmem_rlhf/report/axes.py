"""What all pictures share: colours, axes, and the numbers of a run as series. Loads without matplotlib."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.display.format import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]
INK, GRID, MUTED = "#22303c", "#e3e7eb", "#6b7785"
BLUE, ORANGE, GREEN, RED, PURPLE = "#2f6fb0", "#d9822b", "#2c8a5b", "#b83a4b", "#7658a6"


def series_of(metrics: Rows, key: str) -> list[float]:
    """Return one value a row, NaN (a gap in the line) where it is missing or null."""
    return [math.nan if (value := number(row.get(key))) is None else value for row in metrics]


def steps_of(metrics: Rows) -> list[float]:
    """Return the number of each row's step."""
    return [index if (step := number(row.get("step"))) is None else step for index, row in enumerate(metrics, 1)]


def style_axes(axes: "Axes") -> None:
    """Give axes the grid, ticks and spines of all our plots."""
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c3cad1")


def right_axis(axes: "Axes", label: str, color: str) -> None:
    """Give a second axis its label."""
    axes.set_ylabel(label, fontsize=8, color=color)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
