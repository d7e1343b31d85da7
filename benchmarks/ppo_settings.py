"""What a PPO step costs, and what buys it back: the recipe `style_ppo` on a CPU with other settings; a table.

    python benchmarks/ppo_settings.py [WAY ...] [--output FOLDER] [--json]

A way is a set of changes to the twin of `style_ppo` (see `twins` and `WAYS`), whose classifier is trained first. A run
that is there already is not run again. Ten minutes each on two free cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from twins import prepare, style_classifier, style_ppo
from work import ROOT

WAYS: dict[str, list[str]] = {
    "style_ppo": [],  # as in `learning.py`: two epochs, a critic of its own
    "plain": ["ppo.critic_learning_rate=null", "ppo.normalize_values=false"],  # a critic that learns as the policy does
    "epoch": ["ppo.num_ppo_epochs=1"],
    "head": ["ppo.critic=policy", "ppo.critic_learning_rate=null"],
    "near": ["ppo.kl_target=6", "ppo.kl_horizon=320", "ppo.kl_coef=0.05"],
}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"default: all of {', '.join(WAYS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"), help="where the runs lie")
    parser.add_argument("--json", action="store_true")
    return parser


def train(recipe: str, changes: list[str], folder: Path) -> None:
    """Train where no finished run is there."""
    if (folder / "report.html").is_file():
        return
    resume = ["--resume"] if folder.exists() else []
    command = [sys.executable, "-m", "lowmem_rlhf", "train", recipe, "--output", str(folder), *resume, *changes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr.strip() or done.stdout.strip()}")


def result(folder: Path) -> dict[str, Any]:
    """Return what a finished run tells: means of its steps, and of its thirds what the critic foretold."""
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    explained = [row["value/explained_variance"] for row in rows]
    third = len(rows) // 3
    return {
        "before": found["before"]["reward/style"],
        "after": found["after"]["reward/style"],
        "kl": rows[-1]["objective/kl"],
        "seconds": {part: statistics.fmean(row[f"time/{part}"] for row in rows) for part in ("step", "update")},
        "explained_variance": [statistics.fmean(explained[n * third : (n + 1) * third]) for n in range(3)],
    }


def main() -> None:
    work = options().parse_args()
    if unknown := [way for way in work.ways if way not in WAYS]:
        raise SystemExit(f"{unknown[0]!r} is none of {', '.join(WAYS)}")
    work.output = work.output.resolve()
    if not (work.output / "styles.jsonl").is_file():
        prepare(work.output)
    train("style_classifier", style_classifier(work.output), work.output / "style_classifier")
    found = {}
    for way in work.ways or WAYS:
        train("style_ppo", [*style_ppo(work.output), *WAYS[way]], work.output / way)
        found[way] = result(work.output / way)
        if not work.json:
            one = found[way]
            explained = " ".join(f"{value:5.2f}" for value in one["explained_variance"])
            print(
                f"{way:10} style {one['before']:.3f} -> {one['after']:.3f}  kl {one['kl']:5.1f}  explained variance "
                f"{explained}  step {one['seconds']['step']:5.1f} s, update {one['seconds']['update']:5.1f} s",
                flush=True,
            )
    if work.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
