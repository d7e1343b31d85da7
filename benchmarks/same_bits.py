"""Two versions of the package compute the same bits: training on a CPU, held-out results, tensors and plans.

    python benchmarks/same_bits.py OLD NEW [--quick] [--only NAME ...] [--folder FOLDER] [--json]

OLD and NEW are checkouts (folders with lowmem_rlhf/ in them, run by this Python or --python-old and --python-new) or
environments that the package is installed in (folders with bin/python). Both run the same work at once, each in
processes of its own and in a folder of its own, with the same relative paths:

quickstart  the shipped recipe as it is, on the CPU (--quick: two steps)
twins       two small steps of the CPU twin of every other shipped recipe (`twins`), stage after stage
plans       `plan RECIPE --profile NAME --json` of all shipped recipes on all profiles

Of runs are compared metrics.jsonl (but for time/ and memory/), samples.jsonl, evaluation.json and every tensor: the
adapter, heads, checkpoints with the optimizer's state. Plans are compared value by value. Only the command line and
the run directory are used, so that neither side's modules matter. Steps are planned for --memory, since what is free
may change from one side to the other, and run in OMP_NUM_THREADS threads (1 unless the environment says otherwise): the
order of sums depends on their number.

Exit status 1: something differs, or a side failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from same_values import LISTS, Compared, compare_plans, compare_runs
from twins import DATA, NEEDS, TWINS, prepare

QUICKSTART, PLANS = "quickstart", "plans"
WORK = (QUICKSTART, *TWINS, PLANS)
PARTS = (*LISTS, "evaluation", "tensors", PLANS)
QUICK = ("training.max_steps=2", "data.eval_size=8")
RUNS = Path("runs")  # in each side's folder
SMALL = (
    "data.train_size=32",
    "data.eval_size=4",
    "generation.num_generations=4",
    "generation.max_completion_length=12",
    "training.num_train_epochs=null",
    "training.max_steps=2",
    "training.prompts_per_step=4",
    "training.warmup_steps=0",  # a first step with a learning rate of zero would compare nothing
)
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Side:
    """One version of the package: the Python that runs it, where it lies if it is a checkout, and where it works."""

    name: str
    python: Path
    checkout: Path | None
    folder: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments in the side's folder."""
        env = {"OMP_NUM_THREADS": "1", **os.environ, **QUIET}
        env.pop("PYTHONPATH", None)
        if self.checkout:
            env["PYTHONPATH"] = str(self.checkout)
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="a checkout, or an environment with the package")
    parser.add_argument("new", type=Path, metavar="NEW")
    for name in ("old", "new"):
        text = "that runs this checkout; default: this one"
        parser.add_argument(f"--python-{name}", type=Path, metavar="PYTHON", help=text)
    parser.add_argument("--quick", action="store_true", help="two steps of the quickstart and not the whole recipe")
    parser.add_argument("--only", nargs="+", choices=WORK, metavar="NAME", help=f"of {', '.join(WORK)}")
    parser.add_argument("--memory", default="8GB", help="that the steps are planned for")
    parser.add_argument("--folder", type=Path, help="where the runs are made and stay; default: a temporary folder")
    parser.add_argument("--json", action="store_true")
    return parser


def make_side(name: str, given: Path, python: Path | None, folder: Path) -> Side:
    """Return a side that works in a new folder.

    Raises:
        SystemExit: what was given is no checkout and no environment, or Python imports the package from elsewhere.
    """
    at = given.resolve()
    installed = at / "bin" / "python"
    if (at / "lowmem_rlhf").is_dir():
        side = Side(name, python.absolute() if python else Path(sys.executable), at, folder / name)
    elif installed.exists():
        side = Side(name, installed, None, folder / name)
    else:
        raise SystemExit(f"{given} holds no lowmem_rlhf/ and no bin/python")
    if side.folder.exists():
        raise SystemExit(f"{side.folder} is there already; give a new --folder")
    side.folder.mkdir(parents=True)
    done = side.run("-c", "import lowmem_rlhf; print(lowmem_rlhf.__file__)")
    elsewhere = side.checkout and not Path(done.stdout.strip()).resolve().is_relative_to(at)
    if done.returncode or elsewhere:
        raise SystemExit(f"{name}: {side.python} does not import the package of {given}: {done.stdout}{done.stderr}")
    return side


def chosen(names: Sequence[str] | None) -> list[str]:
    """Return the work to do in its order: what is named, and what that goes on from."""
    wanted = set(names or WORK)
    return [name for name in WORK if name in wanted.union(NEEDS.get(name, name) for name in wanted)]


def overrides(name: str, given: argparse.Namespace) -> list[str]:
    """Return what is changed of a shipped recipe."""
    memory = f"hardware.vram={given.memory}"
    if name == QUICKSTART:
        return ["hardware.device=cpu", memory, *(QUICK if given.quick else ())]
    return [*TWINS[name](RUNS), memory, *SMALL]


def work_through(
    side: Side, names: Sequence[str], given: argparse.Namespace, done: Callable[[str], None]
) -> dict[str, Any]:
    """Do a side's work; return for each part its seconds, its exit code, and the last it said if it failed."""
    prepare(side.folder / RUNS)
    results: dict[str, Any] = {}
    for name in names:
        start = time.perf_counter()
        if name == PLANS:
            process = side.run(str(Path(__file__).with_name("plans_side.py")))
            (side.folder / "plans.jsonl").write_text(process.stdout, encoding="utf-8")
        else:
            command = ("-m", "lowmem_rlhf", "train", name, *overrides(name, given), "--output", str(RUNS / name))
            process = side.run(*command)
        failure = (process.stderr or process.stdout).strip()[-2000:] if process.returncode else ""
        results[name] = {"seconds": time.perf_counter() - start, "code": process.returncode, "failure": failure}
        done(name)
    return results


def run(sides: Sequence[Side], names: Sequence[str], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Let both sides work at once, with a bar for each on stderr; return what `work_through` does, by side."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(len(sides)) as pool:

        def start(side: Side) -> dict[str, Any]:
            task = bar.add_task(side.name, total=len(names))

            def advance(name: str) -> None:
                bar.update(task, advance=1, description=f"{side.name}: {name}")

            return work_through(side, names, given, advance)

        return dict(zip((side.name for side in sides), pool.map(start, sides), strict=True))


def compare(sides: Sequence[Side], names: Sequence[str], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return by recipe what was compared, or which side failed."""
    found: dict[str, Any] = {}
    old, new = sides
    for name in names:
        failures = {side: work[name]["failure"] for side, work in results.items() if work[name]["code"]}
        if failures:
            found[name] = {"failed": failures}
        elif name == PLANS:
            plans = ((side.folder / "plans.jsonl").read_text(encoding="utf-8").splitlines() for side in sides)
            compared = compare_plans(*([json.loads(line) for line in lines] for lines in plans))
            for recipe, one in compared.items():
                found.setdefault(recipe, {})[PLANS] = one
        else:
            found[name] = compare_runs(old.folder / RUNS / name, new.folder / RUNS / name)
    return found


def verdict(parts: dict[str, Any]) -> str:
    """Return the first difference of a recipe's values, what a failed side said last, or nothing."""
    if failures := parts.get("failed"):
        return "; ".join(f"{side} failed: {text.splitlines()[-1]}" for side, text in failures.items())
    first = next((f"{part}: {one.difference}" for part, one in parts.items() if one.difference), "")
    return first or ("" if any(one.values for one in parts.values()) else "there is nothing to compare")


def print_table(found: dict[str, Any]) -> None:
    """Print for people how many values were compared, and where a recipe's first differ."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="values compared, old against new", title_style="bold")
    table.add_column("recipe", no_wrap=True)
    for part in PARTS:
        table.add_column(part, justify="right")
    table.add_column("")
    for name, parts in found.items():
        counts = [parts.get(part, Compared(0)) for part in PARTS]
        shown = "[bold red]differs[/]" if verdict(parts) else "same"
        table.add_row(name, *(f"{one.values:,}" if one.values else "" for one in counts), shown)
    Console().print(table)
    for name, parts in found.items():
        if difference := verdict(parts):
            print(f"{name}: {difference}")


def main(arguments: Sequence[str] | None = None) -> None:
    given = options().parse_args(arguments)
    names = chosen(given.only)
    if not DATA.is_dir():
        raise SystemExit(f"the data of the twins is not here ({DATA})")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).resolve()
        sides = [
            make_side(name, getattr(given, name), getattr(given, f"python_{name}"), folder) for name in ("old", "new")
        ]
        start = time.perf_counter()
        results = run(sides, names, given)
        found = compare(sides, names, results)
        seconds = time.perf_counter() - start
    differing = [name for name, parts in found.items() if verdict(parts)]
    if given.json:
        shown = {
            name: {part: one if part == "failed" else asdict(one) for part, one in parts.items()}
            for name, parts in found.items()
        }
        print(json.dumps({"seconds": seconds, "sides": results, "recipes": shown, "differing": differing}, indent=2))
    else:
        print_table(found)
        print(f"{len(found)} recipes, {len(differing)} of them differ; {seconds / 60:.1f} min")
    if differing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
