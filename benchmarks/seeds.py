"""The quickstart's task over several seeds: ways to learn it at equal numbers of completions; a table.

    python benchmarks/seeds.py [WAY ...] [--seeds 0 1 2 3 4] [--completions 1024] [--set KEY=VALUE ...]
        [--output FOLDER] [--json]

A way is a set of changes to the recipe `quickstart` (see `WAYS`). Each run is a process of its own, and its result the
share of right answers among 512: four sampled for each of the 128 held-out sums. A run that is there already is not run
again. Five minutes each on two free cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from work import ROOT

from lowmem_rlhf.recipe.loading import load_recipe

WAYS: dict[str, list[str]] = {
    "shipped": [],
    "unstopped": ["generation.stop_strings=[]"],  # an answer may go on behind its line
    "large": ["training.prompts_per_step=8", "grpo.num_iterations=1", "generation.stop_strings=[]"],  # half the steps
    "gspo": ["grpo.importance_sampling_level=sequence"],
    "cispo": ["grpo.loss_type=cispo", "grpo.epsilon_high=5"],
    # as many updates; a critic that is clipped by itself and learns normalised returns, each the answer's whole reward
    "ppo": [
        *("algorithm=ppo", "ppo.kl_coef=0", "ppo.num_ppo_epochs=2"),
        *("ppo.lam=1", "ppo.normalize_values=true", "ppo.critic_learning_rate=3e-4"),
    ],
    "ppo_trl": ["algorithm=ppo", "ppo.kl_coef=0", "ppo.num_ppo_epochs=2"],  # with TRL's settings of the critic
}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"default: all of {', '.join(WAYS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further changes, for all ways")
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"), help="where the runs lie")
    parser.add_argument("--json", action="store_true")
    return parser


def run(way: str, seed: int, work: argparse.Namespace) -> dict[str, Any]:
    """Return what a run tells, trained first where it is not there."""
    folder = work.output / f"{way}-{work.completions}-{seed}"
    recipe = load_recipe("quickstart", [*WAYS[way], *work.set])
    steps = work.completions // (recipe.training.prompts_per_step * recipe.generation.num_generations)
    changes = [f"training.max_steps={steps}", f"training.seed={seed}", "evaluation.num_samples=4"]
    if not (folder / "report.html").is_file():
        resume = ["--resume"] if folder.exists() else []
        command = [sys.executable, "-m", "lowmem_rlhf", "train", "quickstart", "--output", str(folder), *resume]
        done = subprocess.run([*command, *changes, *WAYS[way], *work.set], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{folder}: {done.stderr.strip() or done.stdout.strip()}")
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [row["value/explained_variance"] for row in rows if row.get("value/explained_variance") is not None]
    return {
        "before": found["before"]["accuracy"],
        "after": found["after"]["accuracy"],
        "seconds": sum(row["time/step"] for row in rows),
        "explained_variance": statistics.fmean(values[-len(values) // 3 :]) if values else None,
    }


def main() -> None:
    work = options().parse_args()
    if unknown := [way for way in work.ways if way not in WAYS]:
        raise SystemExit(f"{unknown[0]!r} is none of {', '.join(WAYS)}")
    work.output = work.output.resolve()
    found: dict[str, Any] = {}
    for way in work.ways or WAYS:
        runs = {str(seed): run(way, seed, work) for seed in work.seeds}
        after = [one["after"] for one in runs.values()]
        found[way] = {"mean": statistics.fmean(after), "worst": min(after), "runs": runs}
        if not work.json:
            shown = " ".join(f"{one:.1%}" for one in after)
            seconds = statistics.fmean(one["seconds"] for one in runs.values())
            mean = f"mean {found[way]['mean']:.1%}  worst {min(after):.1%}"
            print(f"{way:9} {mean}  ({shown})  {seconds:.0f} s", flush=True)
    if work.json:
        print(json.dumps({"completions": work.completions, "ways": found}, indent=1))


if __name__ == "__main__":
    main()
