"""What it costs a step that a run survives faults: each part timed alone, against the steps of the same run.

    python benchmarks/fault_costs.py [--recipe quickstart] [--steps 3] [--json] [KEY=VALUE ...]

Runs some steps of a recipe and then times, in the same process and with the same trained state, what every step does
besides training: keeping the state of the finished step outside the device, the random states, a guarded call of each
reward, and the rows of the logs. The share is of the median step.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import lowmem_rlhf as lm
from lowmem_rlhf.rewards.guarded import guarded
from lowmem_rlhf.rewards.process_state import random_states, set_random_states

REPEATS = 7


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser


def median_seconds(work: Callable[[], Any]) -> float:
    """Return the median time of a call, the first one left out."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(recipe: str, steps: int, overrides: list[str], output: Path) -> dict[str, Any]:
    """Return the seconds of a step and of each part."""
    fixed = [f"training.max_steps={steps + 1}", "data.eval_size=0"]  # one more than is taken: the run stays open
    with lm.Trainer(recipe, overrides=[*fixed, *overrides], output=output, progress=False) as trainer:
        finished = []
        for step in trainer:
            finished.append(step)
            if len(finished) == steps:
                break
        loop = trainer._open
        counters, last = loop._counters(loop.learned_tokens), finished[-1]
        rewards = max(1, len(getattr(loop, "rewards", ())))
        one_call = partial(guarded, list, "a reward", "", 60.0, "a reward/1")
        parts = {
            "the state of the finished step": median_seconds(lambda: loop._keeper.keep(loop.step, counters)),
            "random states, read and set": median_seconds(lambda: set_random_states(random_states())),
            "guarded calls of the rewards": rewards * median_seconds(one_call),
            "rows of the logs": median_seconds(
                lambda: (loop.run.log_metrics(last.metrics), loop.run.log_samples(loop.step, last.samples))
            ),
        }
        kept = sum(p.numel() * p.element_size() for p in loop.optimizer.parameters.values())
        kept += sum(x.numel() * x.element_size() for x in loop.optimizer.tensors().values())
        back = median_seconds(loop._keeper.put_back)
        seconds = statistics.median(step.metrics["time/step"] for step in finished)
    return {"step_seconds": seconds, "kept_bytes": kept, "put_back_seconds": back, "parts": parts}


def main() -> None:
    given = options().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.recipe, given.steps, given.overrides, Path(folder) / "run")
    whole = sum(found["parts"].values())
    found |= {"added_seconds": whole, "share": whole / found["step_seconds"]}
    if given.json:
        json.dump(found, sys.stdout, indent=2)
        return
    console = Console()
    for name, seconds in found["parts"].items():
        console.print(f"{name:32} {1e3 * seconds:8.2f} ms  {100 * seconds / found['step_seconds']:6.3f} %")
    console.print(
        f"{'together':32} {1e3 * whole:8.2f} ms  {100 * found['share']:6.3f} % of {found['step_seconds']:.2f} s"
    )
    console.print(f"kept: {found['kept_bytes'] / 1e6:.1f} MB; put back in {1e3 * found['put_back_seconds']:.2f} ms")


if __name__ == "__main__":
    main()
