"""What each technique of the engine gains and costs: the same work with it and without it, as ratios.

    python benchmarks/techniques.py [--json] [--quick] [--only WORD]

One process loads the base once (NF4 with double quantization, bf16, a LoRA of rank 16 on all linear layers). For each
technique the sides run in turn, in alternating order: first once each under a counter of live tensor bytes
(live_bytes.py), which warms up for the shapes, then --repeats times each for the time, of which the median counts. A
ratio is with / without: below 1 the technique gains. "peak" holds the base with its adapters and the work; "work" is
what the work adds to what was live before it. Nothing but the technique differs between two sides: a padded batch, for
example, takes our attention and our tiles too, and stock peft's adapters lie on a base with our attention and our
fused layers. Prompts and completions are random tokens, the reference's log-probs any numbers: they change no cost.

An update is forward and backward passes, without the optimizer's step. Decoding writes a fixed number of tokens; for
compaction one token in so many ends a completion, at a temperature so high that lengths follow from the seed alone.

What is left out: offload and fp16 loss scaling, scratch memory inside torch's kernels, and the effect of techniques on
each other: each is switched with all others as the engine has them.

--quick takes a tiny random model and little work, to see that all this works.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from work import ALPHA, MODEL, RANK, add_base_flags, torch_device

from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.hardware.memory import clock


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help=f"default: {MODEL}; with --quick a tiny random one")
    parser.add_argument("--device", default="auto")
    add_base_flags(parser)
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each side")
    parser.add_argument("--only", default="", metavar="WORD", help="only techniques whose name contains it")
    parser.add_argument("--quick", action="store_true", help="a tiny model and little work")
    parser.add_argument("--json", action="store_true")
    return parser


def measure(work: argparse.Namespace) -> dict[str, Any]:
    """Return a row for every pair of every technique, and the settings."""
    import torch
    from techniques_work import QUICK, TECHNIQUES, Sizes, Work

    from lowmem_rlhf.engine.base import SharedBase

    device, threads = torch_device(work.device), torch.get_num_threads()
    if work.quick:
        torch.set_num_threads(1)  # tiny products gain nothing from threads
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model = work.model or (_tiny(Path(scratch)) if work.quick else MODEL)
            base = SharedBase.load(model, device, work.quantization, work.compute_dtype, r=RANK, lora_alpha=ALPHA)
            held = LiveBytes().current
            sizes = QUICK if work.quick else Sizes()
            load = Work(base, model, work.quantization, work.compute_dtype, sizes)
            rows = [
                {"technique": technique, **row}
                for technique, contests in TECHNIQUES.items()
                if work.only in technique
                for contest in contests(load)
                for row in compare(contest, load, work.repeats, held)
            ]
        settings = {"threads": torch.get_num_threads(), "device": str(device), "held_bytes": held, **vars(sizes)}
    finally:
        torch.set_num_threads(threads)
    return {"settings": settings, "techniques": rows}


def _tiny(folder: Path) -> str:
    from model_folders import tiny_llama

    return str(tiny_llama(folder / "tiny"))


def compare(contest: Any, load: Any, repeats: int, held: int) -> list[dict[str, Any]]:
    """Run all sides of a contest in turn; return a row for each of its pairs."""
    device, work_bytes = load.base.device, {}
    for name, side in contest.sides.items():
        load.forget()
        work_bytes[name] = counted(side)
    seconds: dict[str, list[float]] = {name: [] for name in contest.sides}
    for turn in range(repeats):
        order = list(contest.sides)
        for name in reversed(order) if turn % 2 else order:
            start = clock(device)
            contest.sides[name]()
            seconds[name].append(clock(device) - start)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{contest.work}: {times}", file=sys.stderr, flush=True)
    return [
        {
            "work": contest.work,
            "with": one,
            "without": other,
            "time": times[one] / times[other],
            "peak": (held + work_bytes[one]) / (held + work_bytes[other]),
            "work_peak": work_bytes[one] / work_bytes[other],
            "seconds": [times[one], times[other]],
            "all_seconds": [seconds[one], seconds[other]],
            "work_bytes": [work_bytes[one], work_bytes[other]],
            "bound": contest.bound if place == 0 else 0.0,
        }
        for place, (one, other) in enumerate(contest.pairs)
    ]


def counted(side: Any) -> int:
    """Return by how many bytes a run's peak exceeds what was live before it."""
    counter = LiveBytes()
    before = counter.current
    with counter:
        side()
    return counter.peak - before


def print_table(found: dict[str, Any], work: argparse.Namespace) -> None:
    """Print the figures for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = f"with / without each technique ({work.quantization}, {work.compute_dtype}, LoRA r{RANK})"
    table = Table(title=title, title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("technique")
    for name in ("time", "peak", "work"):
        table.add_column(name, justify="right")
    table.add_column("what was compared")
    for row in found["techniques"]:
        ratios = (f"{row[key]:.2f}" for key in ("time", "peak", "work_peak"))
        table.add_row(row["technique"], *ratios, f"{row['with']} / {row['without']}: {row['work']}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for row in found["techniques"]:
        if row["bound"]:
            verdict = "holds" if row["time"] <= row["bound"] else "MISSED"
            print(f"{row['work']}: {row['time']:.2f} with adapters; must be at most {row['bound']}: {verdict}")


def main(arguments: Sequence[str] | None = None) -> None:
    work = options().parse_args(arguments)
    warnings.filterwarnings("ignore")
    found = measure(work)
    if work.json:
        print(json.dumps({"work": vars(work), "load_average": os.getloadavg()[0], **found}, indent=2))
    else:
        print_table(found, work)


if __name__ == "__main__":
    main()
