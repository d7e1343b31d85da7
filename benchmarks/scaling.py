"""How time and memory of a GRPO step of our engine grow with generations, lengths and depth, one at a time.

    python benchmarks/scaling.py [--json] [--plot FILE] [--quick] [--only FACTOR]

Around a base point one factor changes: generations a prompt, completion length, prompt length, layers (the same model
with its first layers only). What bounds memory stays: completions written at once (one group of the base point) and
packed tokens of a pass (likewise). So the peak has to be flat in the number of generations, from the number that fills
these bounds, and may grow with completion length by no more than the KV cache and one packed row; both are printed, the
latter against bytes counted from the model's sizes.

A process of its own loads the model, and anew for each depth. There each point is one step under a counter of live
tensor bytes (live_bytes.py), which warms up for its shapes, and one timed step. Prompts are random tokens, completions
have exactly the length asked for, the phases are those of step_vs_trl.py. A peak holds everything that lives in the
process, the weights included; "work" is what comes on top of what was live before the step.

--quick takes a tiny random model and small numbers, to see that all this works.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from children import Child
from scaling_points import LABELS, PHASES, Point, bounds, fills, series, serve
from work import MODEL, RANK, add_base_flags, add_checkpointing_flags

COLUMNS = (*PHASES, "step")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help=f"default: {MODEL}; with --quick a tiny random one")
    parser.add_argument("--device", default="auto")
    add_base_flags(parser)
    parser.add_argument("--rollout-weights", choices=("quantized", "dequantized"), default="dequantized")
    add_checkpointing_flags(parser)
    parser.add_argument("--tile", type=int, default=32, help="every point's work fills a tile of this many positions")
    parser.add_argument("--quick", action="store_true", help="a tiny model and small numbers")
    parser.add_argument("--only", choices=LABELS, metavar="FACTOR", help=f"one of {', '.join(LABELS)}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (.png, .svg or .pdf)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure(work: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return all points, in the order of their factors, and what follows from them."""
    child = Child("the process with the model", [__file__, *arguments, "--child"])
    settings = child.answer()["settings"]
    wanted = series(work, settings["layers"])
    taken: dict[Point, dict[str, Any]] = {}
    for point in sorted({p for points in wanted.values() for p in points}, key=lambda p: (-p.layers, astuple(p))):
        taken[point] = child.take(json.dumps(asdict(point)))
        print(f"{point}: {taken[point]['seconds']['step']:.1f} s", file=sys.stderr, flush=True)
    child.close()
    points = [
        {"factor": factor, **asdict(point), "fills_bounds": fills(point, work), **taken[point]}
        for factor, members in wanted.items()
        for point in members
    ]
    rows, tokens = bounds(work)
    return {
        "settings": {**settings, "rollout_batch_size": rows, "micro_batch_tokens": tokens},
        "points": points,
        "growth": {factor: GROWTHS[factor](of(points, factor)) for factor in wanted if factor in GROWTHS},
    }


def of(points: list[dict[str, Any]], factor: str) -> list[dict[str, Any]]:
    """Return the points of a factor."""
    return [point for point in points if point["factor"] == factor]


def with_generations(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the peak at most over the peak at least, of the points that fill the bounds; 1 is flat."""
    full = [point for point in points if point["fills_bounds"]]
    whole = {p: [point["peak_bytes"][p] for point in full] for p in COLUMNS}
    work = {p: [point["peak_bytes"][p] - point["bytes_before"] for point in full] for p in whole}
    return {
        "from": full[0]["generations"],
        "to": full[-1]["generations"],
        "peak": {p: max(values) / min(values) for p, values in whole.items()},
        "work": {p: max(values) / min(values) for p, values in work.items()},
    }


def with_completion_length(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Return by how many bytes the longest completions' work exceeds the shortest's, and the bytes that it may."""
    first, last = points[0], points[-1]
    grown = {
        p: (last["peak_bytes"][p] - last["bytes_before"]) - (first["peak_bytes"][p] - first["bytes_before"])
        for p in COLUMNS
    }
    cache, row = last["kv_bytes"] - first["kv_bytes"], last["row_bytes"]
    return {
        "from": first["completion_length"],
        "to": last["completion_length"],
        "bytes": grown,
        "kv_bytes": cache,
        "row_bytes": row,
        "of_allowed": {p: value / (cache + row) for p, value in grown.items()},
    }


GROWTHS = {"generations": with_generations, "completion_length": with_completion_length}


def print_tables(found: dict[str, Any], work: argparse.Namespace) -> None:
    """Print the figures for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for factor in LABELS:
        points = of(found["points"], factor)
        table = Table(
            title=f"{LABELS[factor]} ({work.quantization}, LoRA r{RANK})",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("")
        for phase in COLUMNS:
            table.add_column(f"{phase}\ns", justify="right")
        for phase in (*COLUMNS, "work"):
            table.add_column(f"{phase}\nMB", justify="right")
        for point in points:
            peaks = [*point["peak_bytes"].values(), point["peak_bytes"]["step"] - point["bytes_before"]]
            times = [f"{point['seconds'][phase]:.2f}" for phase in COLUMNS]
            table.add_row(str(point[factor]), *times, *(f"{peak / 1e6:.1f}" for peak in peaks))
        if points:
            console.print(table)
    if grown := found["growth"].get("generations"):
        print(f"peak at most / at least, {grown['from']} to {grown['to']} completions a prompt: {line(grown['peak'])}")
        print(f"  without what was live before the step: {line(grown['work'])}")
    if grown := found["growth"].get("completion_length"):
        allowed = f"KV cache {grown['kv_bytes'] / 1e6:.1f} MB + one packed row {grown['row_bytes'] / 1e6:.1f} MB"
        print(f"peak's growth from {grown['from']} to {grown['to']} completion tokens / ({allowed}): ", end="")
        print(line(grown["of_allowed"]))


def line(values: dict[str, float]) -> str:
    """Return numbers by phase on one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def main(arguments: Sequence[str] | None = None) -> None:
    work = options().parse_args(arguments)
    if work.child:
        serve(work)
        return
    found = measure(work, sys.argv[1:] if arguments is None else arguments)
    if work.plot:
        from scaling_plot import draw

        draw(found["points"], LABELS, work.plot)
    if work.json:
        kept = {k: v for k, v in vars(work).items() if k not in ("json", "child")}
        print(json.dumps({"work": kept, "load_average": os.getloadavg()[0], **found}, indent=2, default=str))
    else:
        print_tables(found, work)


if __name__ == "__main__":
    main()
