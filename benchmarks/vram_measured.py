"""Hold the memory model against live tensors: real training steps on the CPU, their bytes counted phase by phase.

    python benchmarks/vram_measured.py [--families llama gpt2 ...] [--quick] [--json]

Each case (`vram_cases`) loads a model, lets the plan choose what the case does not pin, and takes one step of the run's
own trainer at the longest prompts and completions, after one that makes the optimizer's state. Every storage that an
operator of torch is given or returns is counted while it lives (`live_bytes`). Compared are the peaks of each phase and
of the step with those of the plan's memory model; the optimizer's step is part of the update. Errors are predicted over
measured, less one. What tensors do not show (allocator, CUDA context) is not measured here.

Cases run in processes of their own, ``--processes`` at once. Exit status 1: an error exceeds what is promised.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vram_cases import FAMILIES, GGUF, SMOLLM, Case, cases, write_model
from work import ROOT

MEAN, WORST = 0.03, 0.08  # what is promised of the errors
PARTS = {"rollout": ("rollout",), "score": ("scoring",), "update": ("scoring", "update", "optimizer")}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--quick", action="store_true", help="two cases a family")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="cases at once")
    parser.add_argument("--json", action="store_true")
    return parser


def measure(case: Case) -> dict[str, Any]:
    """Take the step of a case; return predicted and measured bytes and the error of each phase and of the step."""
    import torch
    from model_folders import model_folder

    from lowmem_rlhf.bench.trainer_step import Measured, start_adapter
    from lowmem_rlhf.hardware.cpu_device import cpu_device
    from lowmem_rlhf.planning.plan import make_plan
    from lowmem_rlhf.quiet import hush

    hush()
    torch.set_num_threads(1)  # tiny products gain nothing from threads
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        folder = (
            model_folder(GGUF) if case.family == SMOLLM else write_model(case.family, case.vocabulary, at / "model")
        )
        saved = None
        if case.adapter:
            first = replace(case, algorithm="sft", adapter=False).recipe(folder)
            saved = start_adapter(first, make_plan(first, cpu_device(), "cpu"), at / "start")
        recipe = case.recipe(folder, saved)
        plan = make_plan(recipe, cpu_device(), "cpu")
        peaks = Measured(recipe, plan).peaks
    return {
        "case": case.to_dict(),
        "label": case.label,
        "settings": plan.to_dict()["settings"],
        "phases": compare(plan.memory["phases"], peaks, recipe.algorithm == "reward_model"),
    }


def compare(predicted: dict[str, dict[str, int]], peaks: dict[str, int], pairs: bool = False) -> dict[str, Any]:
    """Return predicted and measured bytes, the error, and the predicted components, of each phase and of the step.

    Args:
        predicted: components by the plan's phases.
        peaks: measured bytes by the trainer's phases.
        pairs: the update begins with passes without gradients (a reward model's).
    """
    found: dict[str, Any] = {}
    for name, measured in peaks.items():
        parts = [predicted[part] for part in PARTS[name] if pairs or name != "update" or part != "scoring"]
        largest = max(parts, key=lambda components: sum(components.values()))
        found[name] = {"predicted": sum(largest.values()), "measured": measured, "components": largest}
    step = {kind: max(phase[kind] for phase in found.values()) for kind in ("predicted", "measured")}
    found["step"] = step
    for phase in found.values():
        phase["error"] = phase["predicted"] / phase["measured"] - 1
    return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean of the errors' sizes, the worst, and the mean with sign: of all phases, and of steps alone."""
    errors = {
        "phases": [phase["error"] for row in rows for name, phase in row["phases"].items() if name != "step"],
        "step": [row["phases"]["step"]["error"] for row in rows],
    }
    return {
        name: {
            "mean": statistics.mean(map(abs, values)),
            "worst": max(values, key=abs),
            "signed": statistics.mean(values),
        }
        for name, values in errors.items()
    }


def machine() -> dict[str, Any]:
    """Return what was measured with: the commit of this checkout, the processor, and versions."""
    from importlib.metadata import version

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    from lowmem_rlhf.hardware.cpu_device import cpu_device

    return {
        "commit": git("rev-parse", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "processor": cpu_device().name,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def run(chosen: Sequence[Case], processes: int) -> list[dict[str, Any]]:
    """Measure all cases, so many at once, with a bar on stderr; return them in order."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    found: dict[int, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_quiet)
    with Progress(*columns, console=Console(stderr=True)) as bar, pool:
        task = bar.add_task("cases", total=len(chosen))
        pending = {pool.submit(measure, case): index for index, case in enumerate(chosen)}
        for done in as_completed(pending):
            case = chosen[pending[done]]
            try:
                found[pending[done]] = done.result()
            except Exception as error:
                raise SystemExit(f"{case.family}, {case.label} failed: {type(error).__name__}: {error}") from error
            bar.update(task, advance=1, description=case.family)
    return [found[index] for index in range(len(chosen))]


def _quiet() -> None:
    """Let what libraries print in a child not come between the lines of the table."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all figures: of every case, of every family, and of all."""
    by_family = {row["case"]["family"]: [] for row in rows}  # type: dict[str, list[dict[str, Any]]]
    for row in rows:
        by_family[row["case"]["family"]].append(row)
    return {
        "machine": machine(),
        "rows": rows,
        "total": summary(rows),
        "by_family": {family: summary(own) for family, own in by_family.items()},
    }


def misses(found: dict[str, Any]) -> list[str]:
    """Return a sentence for each promise that the errors break."""
    return [
        f"{kind} error of {name}: {abs(errors[kind]):.1%} is above {bound:.0%}"
        for name, errors in found["total"].items()
        for kind, bound in (("mean", MEAN), ("worst", WORST))
        if abs(errors[kind]) > bound
    ]


def print_tables(found: dict[str, Any]) -> None:
    """Print the figures for people: each case's worst phase and its step (MB), then the errors by family."""
    print(f"{'':<84}{'worst phase':>32}{'step':>26}")
    print(f"{'case':<84}{'':>8}" + 2 * f"{'model':>8}{'measured':>9}{'error':>8} ")
    for row in found["rows"]:
        phases = {name: phase for name, phase in row["phases"].items() if name != "step"}
        worst = max(phases, key=lambda name: abs(phases[name]["error"]))
        figures = "".join(_figures(phase) for phase in (phases[worst], row["phases"]["step"]))
        print(f"{row['case']['family'] + ': ' + row['label']:<84}{worst:>8}{figures}")
    print(f"\n{'errors':<30}{'phases':>26}{'step':>27}")
    print(f"{'':<30}" + 2 * f"{'mean':>8}{'worst':>9}{'signed':>9} ")
    for name, errors in (*found["by_family"].items(), ("all", found["total"])):
        count = sum(name in ("all", row["case"]["family"]) for row in found["rows"])
        cells = "".join(
            f"{errors[kind]['mean']:>8.2%}{errors[kind]['worst']:>+9.2%}{errors[kind]['signed']:>+9.2%} "
            for kind in ("phases", "step")
        )
        print(f"{f'{name} ({count} cases)':<30}{cells}")


def _figures(phase: dict[str, Any]) -> str:
    return f"{phase['predicted'] / 1e6:>8.2f}{phase['measured'] / 1e6:>9.2f}{phase['error']:>+8.2%} "


def main(arguments: Sequence[str] | None = None) -> None:
    given = options().parse_args(arguments)
    if given.processes < 1:
        raise SystemExit(f"--processes: got {given.processes}; at least one has to run")
    found = report(run(list(cases(tuple(given.families), given.quick)), given.processes))
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        print_tables(found)
    if broken := misses(found):
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
