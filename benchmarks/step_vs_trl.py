"""One GRPO step of our engine against one of TRL's GRPOTrainer: the same work, on the same machine, in the same run.

    python benchmarks/step_vs_trl.py [--prompts 2] [--generations 8] [--completion-length 128] [--json]

The work: B prompts x G completions of exactly L tokens, temperature 1, beta 0.04 (so the reference is scored), loss
dapo, AdamW at 1e-5, gradient clipping at 1; the model as NF4 (double quantization, bf16 compute) with a LoRA of rank 16
on all linear layers. The prompts are the same token ids (checked), the reward is a number made from a hash of the
completion's text, so advantages are never all zero. Texts differ, since each side draws its own.
Both sides write exactly L tokens: TRL through min_new_tokens, ours by an empty set of stop tokens.

TRL's side is what a sensible user of TRL runs: bf16=True and gradient_checkpointing=True (both TRL's defaults), all
completions in one generation batch and, unless --trl-rows says otherwise, in one training batch
(per_device_train_batch_size = B * G), sampling by transformers (no vLLM), peft's LoRA, the default optimizer
(adamw_torch_fused), no logging but to memory. Ours: packed micro-batches of --micro-batch-tokens tokens with gradient
checkpointing, logits in tiles of --tile positions, an NF4 base that lends the rollout a 16-bit copy of its weights.

Each side lives in a process of its own and waits while the other one works. After one warm-up step they take turns in
--repeats timed steps; the table shows medians. One more step runs under a counter of live tensor bytes (see
live_bytes.py; on a card its allocator counts); its time is not counted. Phases: rollout (sampling), score (reference
log-probs), update (forward, backward, optimizer step), other (rewards, advantages, padding). A peak holds everything
that lives in the process, the weights included.

What is left out: loading, evaluation, checkpoints, logging; the difference between completions of unequal length
(where packing and compaction gain more); scratch memory inside torch's kernels; vLLM, which needs a card of its own.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

from children import Channel, Child
from work import BETA, RANK, add_engine_flags, add_work_flags, questions, torch_device

PHASES = ("rollout", "score", "update", "other")
SIDES = ("ours", "trl")
BOUNDS = {"time": (0.3, 0.2), "peak": (0.1, 0.06)}  # of TRL's: what must hold, and the goal


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_work_flags(parser)
    parser.add_argument("--only", choices=SIDES, help="run one side")
    add_engine_flags(parser)
    parser.add_argument("--trl-rows", type=int, default=0, help="TRL's per_device_train_batch_size; 0: all completions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a child process
    return parser


def run_side(work: argparse.Namespace) -> None:
    """Be one side: serve the parent's commands ``step`` and, for a step under the counter, ``bytes``."""
    channel = Channel()
    if work.side == "trl":
        from lowmem_rlhf.bench.trl_step import TrlWork, run_trl

        device, asked, steps = torch_device(work.device), questions(work), work.repeats + 2
        shape = (work.generations, work.completion_length, steps, work.trl_rows)
        run_trl(TrlWork(work.model, device, asked, *shape), channel)
        return
    from our_step import OurStep, cut_of

    ours = OurStep(work.model, torch_device(work.device))
    prompts, cut = ours.encode(questions(work)), cut_of(work)
    channel.ready(
        micro_batch_tokens=cut.micro_batch_tokens,
        tile=cut.tile,
        gradient_checkpointing=cut.checkpointing,
        rollout_weights=work.rollout_weights,
    )
    for _ in range(work.repeats + 2):
        count = channel.command() == "bytes"
        channel.send(**ours.measure(prompts, work.generations, work.completion_length, cut, count))


def measure(work: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run both sides (or one) in turns; return the figures of each."""
    names = [work.only] if work.only else SIDES
    sides = [Child(name, [__file__, *sys.argv[1:], "--side", name]) for name in names]
    settings = {side.name: side.answer()["settings"] for side in sides}
    steps: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for turn in range(work.repeats + 1):
        for side in sides if turn % 2 else reversed(sides):
            step = side.take("step")
            total = sum(step["seconds"].values())
            say(f"{side.name}: {'warm-up' if turn == 0 else f'step {turn}'} {total:.1f} s")
            if turn:
                steps[side.name].append(step)
    found = {}
    for side in sides:
        say(f"{side.name}: counting live bytes")
        found[side.name] = figures(steps[side.name], side.take("bytes"), settings[side.name], work)
        side.close()
    prompts = {name: figure.pop("prompt_lengths") for name, figure in found.items()}
    if len(set(map(tuple, prompts.values()))) > 1:
        raise SystemExit(f"the sides were given different prompts: {prompts}")
    return found


def figures(
    steps: list[dict[str, Any]], counted: dict[str, Any], settings: dict[str, Any], work: argparse.Namespace
) -> dict[str, Any]:
    """Sum up a side's steps: medians of the times, and the counted step's bytes.

    Raises:
        SystemExit: a completion has not the length it was to have.
    """
    lengths = {length for step in [*steps, counted] for length in step["lengths"]}
    if lengths != {work.completion_length}:
        raise SystemExit(f"completions of {work.completion_length} tokens were asked for, there are {sorted(lengths)}")
    seconds = {p: statistics.median([s["seconds"].get(p, 0.0) for s in steps]) for p in PHASES}
    totals = [sum(step["seconds"].values()) for step in steps]
    return {
        "seconds": {**seconds, "step": statistics.median(totals)},
        "all_steps": totals,
        "peak_bytes": {**{p: counted["peaks"].get(p, 0) for p in PHASES}, "step": max(counted["peaks"].values())},
        "bytes_before": counted["start_bytes"],
        "tokens_generated": sum(counted["lengths"]),
        "tokens_updated": counted["update_tokens"],
        "prompt_lengths": counted["prompt_lengths"],
        "settings": settings,
    }


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Return ours / TRL's for every figure that both have."""
    ours, trl = found["ours"], found["trl"]
    return {
        key: {p: ours[key][p] / trl[key][p] for p in ours[key] if trl[key][p]} for key in ("seconds", "peak_bytes")
    } | {"tokens_updated": ours["tokens_updated"] / trl["tokens_updated"]}


def print_table(found: dict[str, Any], work: argparse.Namespace) -> None:
    """Print the figures for people."""
    from rich.console import Console
    from rich.table import Table

    what = f"{work.prompts} prompts x {work.generations} completions x {work.completion_length} tokens"
    table = Table(title=f"one GRPO step, {what}, NF4 + LoRA r{RANK}, beta {BETA}", title_style="bold")
    table.add_column("")
    for name in found:
        table.add_column({"ours": "ours", "trl": "TRL"}[name], justify="right")
    if len(found) == 2:
        table.add_column("ours / TRL", justify="right")

    def row(label: str, values: list[float], form: Callable[[float], str]) -> None:
        ratio = [f"{values[0] / values[1]:.3f}" if values[1] else ""] if len(values) == 2 else []
        table.add_row(label, *(form(value) for value in values), *ratio)

    for phase in (*PHASES, "step"):
        row(f"time {phase}", [f["seconds"][phase] for f in found.values()], lambda s: f"{s:.2f} s")
    table.add_section()
    for phase in (*PHASES, "step"):
        row(f"peak {phase}", [f["peak_bytes"][phase] for f in found.values()], lambda b: f"{b / 1e6:.0f} MB")
    row("live before the step", [f["bytes_before"] for f in found.values()], lambda b: f"{b / 1e6:.0f} MB")
    table.add_section()
    row("tokens generated", [f["tokens_generated"] for f in found.values()], lambda n: f"{n:,.0f}")
    row("tokens through the update", [f["tokens_updated"] for f in found.values()], lambda n: f"{n:,.0f}")
    Console().print(table)
    for name, (bound, goal) in BOUNDS.items() if len(found) == 2 else ():
        key = {"time": "seconds", "peak": "peak_bytes"}[name]
        ratio = found["ours"][key]["step"] / found["trl"][key]["step"]
        verdict = "goal reached" if ratio <= goal else "holds" if ratio <= bound else "MISSED"
        print(f"{name}: {ratio:.3f} of TRL's; must be at most {bound}, goal {goal}: {verdict}")


def main() -> None:
    work = options().parse_args()
    if work.side:
        run_side(work)
        return
    if work.repeats < 1:
        raise SystemExit(f"--repeats: got {work.repeats}; at least one step has to be timed")
    found = measure(work, lambda text: print(text, file=sys.stderr, flush=True))
    if work.json:
        kept = {k: v for k, v in vars(work).items() if k not in ("json", "side")}
        result = {
            "work": kept,
            "load_average": os.getloadavg()[0],
            **found,
            **({"ratios": ratios(found)} if len(found) == 2 else {}),
        }
        print(json.dumps(result, indent=2, default=str))
    else:
        print_table(found, work)


if __name__ == "__main__":
    main()
