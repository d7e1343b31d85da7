"""The list of runs as a table. No torch here."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lowmem_rlhf.display.format import format_measure, format_seconds, in_words
from lowmem_rlhf.display.tables import fitted, plain_table
from lowmem_rlhf.run.listing import RunSummary


def print_runs(runs: Sequence[RunSummary], folder: Path) -> None:
    """Print a line for each run, or that there is none."""
    if not runs:
        print(f"no runs in {folder}; begin one with `lowmem-rlhf train RECIPE`")
        return
    rows = [
        (run.path, run.algorithm, run.state, _steps(run), format_seconds(run.seconds), _result(run)) for run in runs
    ]
    console = fitted(Console(highlight=False))
    console.print(plain_table(("run", "algorithm", "state", "steps", "time", "held-out"), rows))


def _steps(run: RunSummary) -> str:
    return f"{run.steps} of {run.max_steps}" if run.max_steps else str(run.steps)


def _result(run: RunSummary) -> str:
    if run.headline is None:
        return "-"
    before, after = (format_measure(run.headline, value) for value in (run.before, run.after))
    return f"{in_words(run.headline)} {before} -> {after}"
