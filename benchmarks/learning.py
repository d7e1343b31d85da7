"""Real models learn from real data: the shipped recipes' twins on a CPU, measured on held-out data; a table, plots.

    python benchmarks/learning.py [NAME ...] [--output FOLDER] [--plots FOLDER] [--json]

Each recipe runs as it ships with the overrides of `twins`: a small real model, local data, few steps. Later stages find
the runs of earlier ones in the output folder, so a name may need those before it (the order without names is right).
A run that is there already is not run again. A minute to ten minutes each on two free cores.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from twins import DATA, TWINS, prepare
from work import ROOT

sys.path.insert(0, str(ROOT))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"recipes; default: {' '.join(TWINS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"), help="where runs and data lie")
    parser.add_argument("--plots", type=Path, help="write a picture of each run into this folder")
    parser.add_argument("--json", action="store_true")
    return parser


def result(folder: Path) -> dict[str, Any]:
    """Return what a finished run tells of its learning: held-out results before and after, and its last step."""
    from lowmem_rlhf.run.directory import open_run

    run = open_run(folder)
    last = run.metrics()[-1]
    kept = ("step", "kl", "objective/kl", "value/explained_variance", "policy/approx_kl_first")
    return {**run.evaluation(), "last": {key: last[key] for key in kept if key in last}}


def main() -> None:
    work = options().parse_args()
    if unknown := [name for name in work.names if name not in TWINS]:
        raise SystemExit(f"{unknown[0]!r} has no twin; there are {', '.join(TWINS)}")
    if not (DATA / "style").is_dir():
        raise SystemExit(f"the data of the twins is not here ({DATA})")
    from lowmem_rlhf.display.run_display import ConsoleDisplay
    from lowmem_rlhf.recipe.loading import load_recipe
    from lowmem_rlhf.report.plots import plot_reward
    from lowmem_rlhf.run.directory import open_run
    from lowmem_rlhf.session.train import train

    if not (work.output / "styles.jsonl").is_file():
        prepare(work.output)
    found: dict[str, Any] = {}
    for name in work.names or TWINS:
        folder = work.output / name
        if not (folder / "report.html").is_file():
            train(load_recipe(name, TWINS[name](work.output)), folder, folder.exists(), ConsoleDisplay())
        found[name] = result(folder)
        if work.plots and name != "style_classifier":
            run = open_run(folder)
            plot_reward(run.metrics(), run.evaluation(), work.plots / f"{name}.png", name)
    if work.json:
        print(json.dumps(found, indent=2))
        return
    for name, one in found.items():
        print(f"\n{name}: {one['last']}")
        before, after = one.get("before", {}), one["after"]
        for key, value in after.items():
            if isinstance(value, float):
                start = f"{before[key]:.4f}" if isinstance(before.get(key), float) else "-"
                print(f"  {key:<24} {start:>8} -> {value:.4f}")


if __name__ == "__main__":
    main()
