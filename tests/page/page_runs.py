"""Run directories as training leaves them, without training. Not a test module."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def lines(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as a log has them."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a log."""
    with path.open("a", encoding="utf-8") as file:
        file.write(lines(rows))


def metrics_row(step: int, parts: int = 3) -> dict[str, Any]:
    """Return a step's metrics."""
    numbers = {f"objective/part_{place}": step * 0.001 + place for place in range(parts)}
    return {"step": step, "reward/mean": step / 1000, "time/step": 2.0, "kl": None, **numbers}


def sample_row(step: int, place: int, **changes: Any) -> dict[str, Any]:
    """Return a logged sample; its prompt is one of ten."""
    return {
        "step": step,
        "prompt": [{"role": "user", "content": f"What is {(step + place) % 10} + 1?"}],
        "completion": f"The answer of step {step} is {step * place}.",
        "rewards": {"exact": float(place % 2), "length": step / 10},
        "advantage": 0.5,
        "tokens": 5 + place,
        "truncated": place == 3,
        **changes,
    }


def write_run(path: Path, steps: int = 0, samples: int = 0, of: int = 4, left: str = "", **recipe: Any) -> Path:
    """Write a run that has taken so many steps, with so many samples a step; return its folder.

    Args:
        of: `training.max_steps`.
        left: the folder that a finished run leaves.
        recipe: further values of recipe.yaml.
    """
    path.mkdir(parents=True)
    rewards = [{"function": "exact", "name": "exact", "weight": 2.0}, {"function": "length", "name": "length"}]
    values = {"name": "sums", "algorithm": "grpo", "training": {"max_steps": of}, "rewards": rewards, **recipe}
    (path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (path / "metrics.jsonl").write_text(lines(map(metrics_row, range(1, steps + 1))))
    rows = (sample_row(step, place) for step in range(1, steps + 1) for place in range(samples))
    (path / "samples.jsonl").write_text(lines(rows))
    if left:
        (path / left).mkdir()
    return path
