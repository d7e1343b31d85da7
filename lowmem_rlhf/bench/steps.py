"""A GRPO step of our engine and one of TRL's, on the same work: the parts ``step`` and ``precisions``.

The work is that of ``benchmarks/step_vs_trl.py``: the same prompts, completions of exactly the same length, a reward
from a hash of the text, beta 0.04, a LoRA of rank 16 on all linear layers, all layers recomputed on both sides. The
sides run one after the other, each in a process of its own. After one step that is not timed the timed ones follow, and
one whose bytes are counted.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from lowmem_rlhf.bench.our_step import Cut, OurStep
from lowmem_rlhf.bench.trl_step import TrlWork, run_trl
from lowmem_rlhf.bench.work import PROBLEMS, Work
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.progress import ProgressCallback

PHASES = ("rollout", "score", "update", "other")


def ours(work: Work, progress: ProgressCallback, quantization: str = "nf4") -> dict[str, Any]:
    """Return the figures of our engine's step with weights in this precision (see `figures`)."""
    sizes, dtype = work.sizes, work.int8_dtype if quantization == "int8" else work.compute_dtype
    step = OurStep(work.model, torch.device(work.device), quantization, dtype)
    prompts = step.encode(PROBLEMS[: sizes.prompts])
    copies = quantization == "nf4" and sizes.dequantized
    cut = Cut(sizes.prompts * sizes.generations, sizes.micro_batch_tokens, sizes.tile, True, copies, keep_graphs=True)
    steps = []
    for turn in range(sizes.repeats + 2):
        progress(turn + 1, sizes.repeats + 3)
        counted = turn == sizes.repeats + 1
        steps.append(step.measure(prompts, sizes.generations, sizes.completion_length, cut, counted))
    return {**figures(steps[1:-1], steps[-1], sizes.completion_length), "compute_dtype": dtype}


class _Listed:
    """The commands of a side, and its answers."""

    def __init__(self, repeats: int, progress: ProgressCallback) -> None:
        self._commands = ["step"] * (repeats + 1) + ["bytes"]
        self._progress, self._all = progress, len(self._commands) + 1
        self.settings: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []

    def ready(self, **settings: Any) -> None:
        self.settings = settings
        self._progress(1, self._all)

    def command(self) -> str:
        return self._commands[len(self.steps)]

    def send(self, **message: Any) -> None:
        self.steps.append(message)
        self._progress(len(self.steps) + 1, self._all)


def trl(work: Work, progress: ProgressCallback) -> dict[str, Any]:
    """Return the figures of TRL's step (see `figures`), with the settings that it chose."""
    sizes, listed = work.sizes, _Listed(work.sizes.repeats, progress)
    given = TrlWork(
        work.model,
        torch.device(work.device),
        PROBLEMS[: sizes.prompts],
        sizes.generations,
        sizes.completion_length,
        sizes.repeats + 2,
        compute_dtype=work.compute_dtype,
    )
    run_trl(given, listed)
    found = figures(listed.steps[1:-1], listed.steps[-1], sizes.completion_length)
    return {**found, "compute_dtype": work.compute_dtype, "settings": listed.settings}


def figures(steps: Sequence[dict[str, Any]], counted: dict[str, Any], length: int) -> dict[str, Any]:
    """Return a side's medians of seconds, and the counted step's bytes, each by phase and of the step.

    Raises:
        RunError: a completion has not the length it was to have.
    """
    lengths = {one for step in (*steps, counted) for one in step["lengths"]}
    if lengths != {length}:
        raise RunError(f"completions of {length} tokens were asked for, and there are some of {sorted(lengths)}")
    return {
        "seconds": {
            **{phase: statistics.median(step["seconds"].get(phase, 0.0) for step in steps) for phase in PHASES},
            "step": statistics.median(sum(step["seconds"].values()) for step in steps),
        },
        "peak_bytes": {
            **{phase: counted["peaks"].get(phase, 0) for phase in PHASES},
            "step": max(counted["peaks"].values()),
        },
        "bytes_before": counted["start_bytes"],
        "tokens_generated": sum(counted["lengths"]),
        "tokens_updated": counted["update_tokens"],
        "prompt_lengths": counted["prompt_lengths"],
        "note": counted.get("note", ""),
    }
