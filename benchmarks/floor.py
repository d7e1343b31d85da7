"""How far a GRPO step of our engine is from the least time that this machine could take for it.

    python benchmarks/floor.py [--prompts 2] [--generations 8] [--completion-length 128] [--device auto] [--json]

The floor of a part of the step is the longer of two times: its FLOPs over this machine's rate of matrix products, and
the bytes that it has to read and write over this machine's memory bandwidth. FLOPs and bytes are counted from the
model's sizes and the step's tokens (flops.py says how; each prompt counts once a group). Both rates are measured in the
same run (machine.py): products in the compute dtype at the shapes of the model's own linear layers and head, with as
many rows as the parts have at once, of which the fastest is the machine's rate. Parts follow one another, so a phase's
floor is the sum of its parts'. The distance is the measured time over the floor.

The column "products" is what torch's own products of the part's FLOPs would take with the rows that the part has, with
weights that lie in the cache and nothing else to do: with the few rows of decoding far more than the floor.

The work is that of step_vs_trl.py. After one warm-up step --repeats steps are timed; the table shows medians. Rates are
measured before and after the steps and the better ones are taken: a busy machine must not look closer to its floor.

What is left out: elementwise work, activations that leave the cache, dequantizing as arithmetic, tokenizing, rewards.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from work import RANK, add_base_flags, add_engine_flags, add_work_flags, questions, torch_device

PHASES = ("rollout", "score", "update")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_work_flags(parser)
    add_engine_flags(parser)
    add_base_flags(parser)
    parser.add_argument("--json", action="store_true")
    return parser


def measure(work: argparse.Namespace) -> dict[str, Any]:
    """Take the steps, measure the machine, and hold one against the other; everything by phase and part."""
    from machine import bandwidth
    from our_step import OurStep, cut_of

    from lowmem_rlhf.architecture.lookup import model_dimensions

    device, cut, dims = torch_device(work.device), cut_of(work), model_dimensions(work.model)
    ours = OurStep(work.model, device, work.quantization, work.compute_dtype)
    prompts = ours.encode(questions(work))
    needed = step_parts(work, cut, dims, [len(prompt) for prompt in prompts])
    rows = sorted({part.rows for part in needed if part.flops.total})

    def step() -> dict[str, Any]:
        return ours.measure(prompts, work.generations, work.completion_length, cut)

    def machine() -> tuple[Rates, float]:
        return rates(dims, rows, cut.tile, work.compute_dtype, device), bandwidth(device)

    step()  # warm-up
    (before, slow), steps, (after, fast) = machine(), [step() for _ in range(work.repeats)], machine()
    rate = {n: {kind: max(before[n][kind], after[n][kind]) for kind in before[n]} for n in rows}
    found = [held(part, rate, max(slow, fast)) for part in needed]
    return {
        "machine": {
            "device": str(device),
            "flops_per_second": best_rate(rate),
            "bytes_per_second": max(slow, fast),
            "flops_per_second_by_rows": rate,
        },
        "parts": found,
        **by_phase(found, steps),
        "update_tokens": steps[-1]["update_tokens"],
    }


def step_parts(work: argparse.Namespace, cut: Any, dims: Any, prompt_lengths: list[int]) -> list[Any]:
    """Return the parts of the step that the flags describe."""
    from flops import Layout, Tokens, parts

    width = 4 if work.compute_dtype == "float32" else 2
    copied = cut.dequantized and work.quantization == "nf4"
    tokens = Tokens(prompt_lengths, [work.completion_length] * (len(prompt_lengths) * work.generations))
    layout = Layout(work.quantization, width, RANK, copied)
    return parts(dims, tokens, layout, cut.rows, cut.micro_batch_tokens, cut.checkpointing)


def by_phase(found: list[dict[str, Any]], steps: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return medians of the measured seconds, the sums of the parts' times, and the distances, by phase."""
    seconds = {p: statistics.median(step["seconds"].get(p, 0.0) for step in steps) for p in (*PHASES, "other")}
    seconds["step"] = statistics.median(sum(step["seconds"].values()) for step in steps)
    sums = {}
    for key in ("floor_seconds", "product_seconds"):
        sums[key] = {p: sum(part[key] for part in found if part["phase"] == p) for p in PHASES}
        sums[key]["step"] = sum(sums[key].values())
    floors = sums["floor_seconds"]
    return {"seconds": seconds, **sums, "distance": {name: seconds[name] / floors[name] for name in floors}}


Rates = dict[int, dict[str, float]]  # by rows: FLOP/s of the blocks' linear layers, and of the head


def rates(dims: Any, rows: list[int], tile: int, compute_dtype: str, device: Any) -> Rates:
    """Measure products with each number of rows; the head's with no more than a tile has."""
    import torch
    from machine import matmul_rate

    dtype = getattr(torch, compute_dtype)
    linears = [(linear.inputs, linear.outputs) for linear in dims.linears]
    head = [(dims.hidden_size, dims.vocab_size)]
    return {
        n: {"linears": matmul_rate(linears, n, dtype, device), "head": matmul_rate(head, min(n, tile), dtype, device)}
        for n in rows
    }


def best_rate(rate: Rates) -> float:
    """Return the machine's rate: the fastest products of all."""
    return max(value for kinds in rate.values() for value in kinds.values())


def held(part: Any, rate: Rates, speed: float) -> dict[str, Any]:
    """Return a part with its times: by FLOPs, by bytes, the floor, and what torch's products alone would take."""
    flops, products = part.flops, 0.0
    if flops.total:
        own = rate[part.rows]
        products = (flops.total - flops.head) / own["linears"] + flops.head / own["head"]
    by_flops, by_bytes = flops.total / best_rate(rate), part.memory / speed
    return {
        "name": part.name,
        "phase": part.phase,
        "rows": part.rows,
        "flops": {**asdict(flops), "total": flops.total},
        "bytes": part.memory,
        "flop_seconds": by_flops,
        "byte_seconds": by_bytes,
        "floor_seconds": max(by_flops, by_bytes),
        "product_seconds": products,
    }


def print_tables(found: dict[str, Any], work: argparse.Namespace) -> None:
    """Print the figures for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    what = f"{work.prompts} prompts x {work.generations} completions x {work.completion_length} tokens"
    style: dict[str, Any] = {"title_style": "bold", "box": SIMPLE_HEAD, "pad_edge": False}
    parts = Table(title=f"what one GRPO step needs, {what}, {work.quantization} + LoRA r{RANK}", **style)
    for column in ("part", "rows", "GFLOP", "MB", "by FLOPs\ns", "by bytes\ns", "floor\ns", "products\ns"):
        parts.add_column(column, justify="left" if column == "part" else "right")
    for part in found["parts"]:
        parts.add_row(
            f"{part['phase']}: {part['name']}",
            str(part["rows"] or ""),
            f"{part['flops']['total'] / 1e9:,.1f}",
            f"{part['bytes'] / 1e6:,.0f}",
            *(f"{part[key]:.3f}" for key in ("flop_seconds", "byte_seconds", "floor_seconds", "product_seconds")),
        )
    times = Table(title="measured against the floor", **style)
    for column in ("phase", "measured", "floor", "distance", "products"):
        times.add_column(column, justify="left" if column == "phase" else "right")
    for name, floor in found["floor_seconds"].items():
        seconds = (found["seconds"][name], floor, found["distance"][name], found["product_seconds"][name])
        times.add_row(name, *(f"{x:.2f} {unit}" for x, unit in zip(seconds, ("s", "s", "x", "s"), strict=True)))
    console = Console()
    console.print(parts)
    console.print(times)
    machine = found["machine"]
    best, speed = machine["flops_per_second"] / 1e9, machine["bytes_per_second"] / 1e9
    print(f"this machine ({machine['device']}, {work.compute_dtype}): {best:,.0f} GFLOP/s, {speed:,.1f} GB/s")


def main(arguments: Sequence[str] | None = None) -> None:
    work = options().parse_args(arguments)
    if work.repeats < 1:
        raise SystemExit(f"--repeats: got {work.repeats}; at least one step has to be timed")
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the result
        found = measure(work)
    if work.json:
        kept = {k: v for k, v in vars(work).items() if k != "json"}
        print(json.dumps({"work": kept, "load_average": os.getloadavg()[0], **found}, indent=2, default=str))
    else:
        print_tables(found, work)


if __name__ == "__main__":
    main()
