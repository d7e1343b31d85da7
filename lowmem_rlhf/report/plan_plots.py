"""Pictures of the plan: the memory of each phase against a card's, and what fits on which card.

matplotlib is imported when a picture is drawn, and used through its objects, as in `plots`.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.algorithms.registry import spec_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import atomic_write, writing
from lowmem_rlhf.paths import cannot_be_written, obstacle
from lowmem_rlhf.planning.fits import Fit, WhatFits
from lowmem_rlhf.report.axes import INK, MUTED, RED, style_axes
from lowmem_rlhf.report.fits_view import (
    GIB,
    PRICE,
    SPEED,
    gigabytes,
    length_text,
    precision_text,
    short_name,
    speed_text,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
DPI = 160
# What a bar shows, in its order: colours that are told apart with any colour vision (a test measures it), and the
# components of the plan. What is in none of these is `other`; the allocator's share comes last.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "weights": ("#1d1038", ("weights", "gathered_layers", "embeddings")),
    "adapters, gradients, optimizer": (
        "#2f96f3",
        ("adapters", "optimizer_state", "adapter_copies", "gradients", "update_buffers", "reference_adapter"),
    ),
    "copies and graphs for sampling": ("#0a4f1c", ("rollout_copy", "dequantized_weight", "graphs")),
    "key-value cache": ("#6fe8a0", ("kv_cache", "seen_tokens")),
    "activations": (
        "#e87d1e",
        (
            *("stored_activations", "layer_activations", "layer_gradients", "final_states", "scored_states"),
            *("prefill_activations", "attention_scores", "positions"),
        ),
    ),
    "logits": ("#8a1c97", ("logits_tile", "full_logits", "sampling_logits", "compared_logits")),
    "other": ("#808893", ()),
    "allocator": ("#dde0e4", ("allocator",)),
}
SMALL = 0.004  # of the axis: a group that is nowhere wider is part of `other`
PRECISIONS = {"32-bit": "#1f4f80", "16-bit": "#79b4f2", "int8": "#c58f68", "nf4": "#f7d266", None: "#eceff1"}
_TITLE: dict[str, Any] = {"fontsize": 9.5, "color": INK, "loc": "left", "fontweight": "bold"}


def check_picture(path: Path) -> None:
    """Refuse a picture's path before anything is computed for it.

    Raises:
        UserError: its kind is not known, or its folder does not exist.
    """
    if path.suffix.lower() not in KINDS:
        got = f"{path.suffix!r}" if path.suffix else "no kind at all"
        raise UserError(f"--plot {path}: got {got}; a picture is a {', '.join(KINDS[:-1])} or {KINDS[-1]} file")
    if why := obstacle(path):
        raise UserError(f"--plot {path}: it {why}; choose another name")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: the folder {str(path.parent)!r} does not exist; make it first")
    if path.is_dir():
        raise UserError(f"--plot {path}: it is a folder; name a file in it")
    if why := cannot_be_written(path):
        raise UserError(f"--plot {path}: {why}; choose another folder")


def save_picture(figure: "Figure", path: Path) -> Path:
    """Write a figure, whole or not at all, in the kind that its suffix says.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    kind = path.suffix.lower().lstrip(".")
    figure.savefig(buffer, format=kind, dpi=DPI)
    if kind == "png":
        buffer = _with_palette(buffer)
    with writing(f"--plot {path}: the file", UserError):
        atomic_write(path, buffer.getvalue())
    return path


def _with_palette(picture: io.BytesIO) -> io.BytesIO:
    """Return a picture of a few colours and their edges with a palette of 256, a fifth of its bytes."""
    from PIL import Image  # matplotlib's own dependency

    smaller = io.BytesIO()
    with Image.open(picture) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(smaller, "png", optimize=True, dpi=(DPI, DPI))
    return smaller


def draw_phases(plan: dict[str, Any], name: str = "") -> "Figure":
    """Return the picture of a plan (as ``plan --json`` gives it): a bar of components for each phase.

    Lines mark the budget and the card's memory; on the largest phase a bracket goes from the live tensors alone to what
    the allocator may hold at its 90th percentile.
    """
    memory, device = plan["memory"], plan["device"]
    phases: dict[str, dict[str, int]] = memory["phases"]
    limit = 1.06 * max(device["total_bytes"], memory["high_bytes"], memory["peak_bytes"]) / GIB
    shown = _shown(phases, limit * GIB)
    figure = _figure(8.4, 1.45 + 0.46 * len(phases) + 0.17 * (-(-len(shown) // 4)))
    axes = figure.add_subplot()
    style_axes(axes)
    axes.grid(False, axis="y")
    left = [0.0] * len(phases)
    for group, sizes in shown.items():
        widths = [size / GIB for size in sizes]
        axes.barh(
            range(len(phases)), widths, 0.62, left=left, color=GROUPS[group][0], label=group, edgecolor="white",
            linewidth=0.6,
        )  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    _marks(axes, plan, left, limit)
    axes.set_yticks(range(len(phases)), list(phases), fontsize=8.5, color=INK)
    axes.set_ylim(len(phases) - 0.3, -0.75)
    axes.set_xlim(0, limit)
    axes.set_xlabel(f"GiB, predicted ({_settings(plan)})", fontsize=8, color=MUTED)
    axes.set_title(f"{name}{' on ' if name else ''}{device['name']}", **_TITLE, pad=27)
    figure.legend(
        loc="outside lower left", ncols=4, fontsize=7.5, frameon=False, labelcolor=INK, handlelength=1.1,
        handleheight=1.0, columnspacing=1.6,
    )  # fmt: skip
    return figure


def _settings(plan: dict[str, Any]) -> str:
    settings = plan["settings"]
    weights = settings["compute_dtype"] if settings["quantization"] == "none" else settings["quantization"]
    rows = f", rollouts of {settings['rollout_batch_size']}" if "rollout" in plan["memory"]["phases"] else ""
    return f"{weights} weights, micro-batches of {settings['micro_batch_tokens']} tokens{rows}"


def _shown(phases: dict[str, dict[str, int]], limit: float) -> dict[str, list[int]]:
    """Return the groups' bytes, one for each phase; what is nowhere to be seen is in the rest."""
    group_of = {name: group for group, (_, names) in GROUPS.items() for name in names}
    columns = {group: [0] * len(phases) for group in GROUPS}
    for place, parts in enumerate(phases.values()):
        for name, size in parts.items():
            columns[group_of.get(name, "other")][place] += size
    for group in [one for one in columns if one not in ("other", "allocator")]:
        if max(columns[group]) < SMALL * limit:
            small = columns.pop(group)
            columns["other"] = [rest + size for rest, size in zip(columns["other"], small, strict=True)]
    return {group: sizes for group, sizes in columns.items() if any(sizes)}


def _marks(axes: "Axes", plan: dict[str, Any], ends: list[float], limit: float) -> None:
    """Draw budget and memory as lines, each phase's sum beside its bar, and the bracket of low and high."""
    from matplotlib.patheffects import withStroke

    memory = plan["memory"]
    budget, whole = memory["budget_bytes"] / GIB, plan["device"]["total_bytes"] / GIB
    near = abs(whole - budget) < 0.2 * limit
    for value, text, color, style, side in (
        (budget, f"budget {budget:.2f}", RED, "-", "right" if near else "center"),
        (whole, f"memory {whole:.2f}", INK, (0, (4, 2)), "left" if near and whole < 0.85 * limit else "right"),
    ):
        axes.axvline(value, color=color, linewidth=1.3, linestyle=style, zorder=3)
        height = -0.82 if text.startswith("budget") or side == "left" or not near else -1.12
        axes.text(value, height, text, ha=side, va="bottom", fontsize=8, color=color, fontweight="bold")
    rim = [withStroke(linewidth=2.2, foreground="white")]
    peak = max(range(len(ends)), key=ends.__getitem__)
    for row, end in enumerate(ends):
        outside = end + 0.075 * limit < budget  # else inside the bar, where no line stands
        axes.text(
            end + (0.008 if outside else -0.008) * limit, row, f"{end:.2f}", ha="left" if outside else "right",
            va="center", fontsize=8, color=INK, fontweight="bold" if row == peak else "normal", zorder=5,
            path_effects=rim,
        )  # fmt: skip
    low, high = memory["low_bytes"] / GIB, memory["high_bytes"] / GIB
    if high > low:
        axes.plot([low, high], [peak + 0.5] * 2, "|-", color=INK, linewidth=1.0, markersize=6, zorder=4)
        axes.text(
            low - 0.008 * limit, peak + 0.5, f"low {low:.2f}, high {high:.2f}", ha="right", va="center", fontsize=7,
            color=INK, zorder=5, path_effects=rim,
        )  # fmt: skip


def draw_fits(fits: WhatFits) -> "Figure":
    """Return the picture of what fits: a panel of models against cards for each algorithm.

    Of a single card it is one panel of models against algorithms, with the longest that fits.
    """
    if len(fits.cards) > 1:
        models = len(fits.models)
        figure = _figure(8.4, 0.5 + len(fits.cells) * (0.52 + 0.3 * models))
        for panel, axes in zip(fits.cells, figure.subplots(len(fits.cells), 1), strict=True):
            axes.set_title(title(fits, panel), **_TITLE, pad=5)
            _heat_map(axes, fits.cells[panel], [card.label.replace(" GB ", " GB\n") for card in fits.cards], _small)
    else:
        figure = _figure(8.4, 0.95 + 0.26 * len(fits.models))
        axes = figure.add_subplot()
        rows = {model: [fits.cells[algorithm][model][0] for algorithm in fits.cells] for model in fits.models}
        columns = [_column(fits, algorithm) for algorithm in fits.cells]
        axes.set_title(fits.cards[0].device.name, **_TITLE, pad=5)
        _heat_map(axes, rows, columns, _large)
    _legend(figure, fits)
    return figure


def _column(fits: WhatFits, algorithm: str) -> str:
    """Return what a column is about: ``GRPO, 512 + 8 x 512 tokens``."""
    *prompt, length = fits.lengths[algorithm].values()
    count = fits.generations[algorithm]
    parts = [*map(str, prompt), f"{count} x {length}" if count > 1 else str(length)]
    return f"{spec_of(algorithm).title}, {' + '.join(parts)} tokens"


def _heat_map(axes: "Axes", rows: dict[str, list[Fit]], columns: list[str], text: Any) -> None:
    from matplotlib.colors import to_rgb

    kinds = [[PRECISIONS[cell.precision if cell.fits else None] for cell in row] for row in rows.values()]
    axes.imshow([[to_rgb(kind) for kind in row] for row in kinds], aspect="auto", interpolation="nearest")
    for y, row in enumerate(rows.values()):
        for x, cell in enumerate(row):
            color = "white" if cell.fits and cell.precision == "32-bit" else INK
            axes.text(x, y, text(cell), ha="center", va="center", fontsize=7, color=color, linespacing=1.15)
    axes.set_xticks(range(len(columns)), columns, fontsize=7.5, color=INK)
    axes.set_yticks(range(len(rows)), [short_name(model) for model in rows], fontsize=7.5, color=INK)
    axes.tick_params(length=0)
    axes.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _small(cell: Fit) -> str:
    """Return the longest completion over the tokens a second; of what does not fit what is missing over the longest."""
    if cell.room_bytes is None:
        return "refused"
    if not cell.fits:
        return f"-{gigabytes(cell.room_bytes)}" + (f"\nup to {cell.longest:,}" if cell.longest else "")
    return f"{length_text(cell)}{'*' if cell.savings else ''}\n{speed_text(cell)}"


def _large(cell: Fit) -> str:
    length = f"longest {cell.longest:,}" if cell.longest else "no length fits"
    if cell.room_bytes is None:
        return "refused"
    if not cell.fits:
        return f"{gigabytes(cell.room_bytes)} short, {length}"
    return f"{precision_text(cell)}, {length}, {speed_text(cell)}"


def _legend(figure: "Figure", fits: WhatFits) -> None:
    """Say what the colours and the numbers mean, for the kinds that are there."""
    from matplotlib.patches import Patch

    cells = [cell for rows in fits.cells.values() for row in rows.values() for cell in row]
    there = {cell.precision if cell.fits else None for cell in cells}
    names = {"16-bit": "16-bit weights", None: "does not fit (GiB short)"}
    handles = [Patch(color=PRECISIONS[kind], label=names.get(kind, kind)) for kind in PRECISIONS if kind in there]
    stars = f"\n* {PRICE}" if any(cell.fits and cell.savings for cell in cells) else ""
    figure.legend(handles=handles, loc="outside upper left", ncols=5, fontsize=8, frameon=False, labelcolor=INK)
    text = f"predicted; the longest completion (SFT: example) that fits, in tokens\n{SPEED}{stars}"
    figure.supxlabel(text, fontsize=7.5, color=MUTED)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")
