"""Recipes, data and loops for the tests of TRL's trainers. Not a test module."""

import json
from pathlib import Path
from typing import Any

import torch
from training_cases import Talk, recipe_of

from lowmem_rlhf.algorithms.trl.update import TRLLoop, make_trl_loop
from lowmem_rlhf.data.examples import read_data
from lowmem_rlhf.data.sources import load_rows
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.planning.run_plan import running_plan
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.roles import add_roles

# answers of several lengths; a prompt that ends in a blank is followed by its answer as it is
PAIRS = [
    {"prompt": "1+2= ", "chosen": "3", "rejected": "12"},
    {"prompt": "a b? ", "chosen": "ab", "rejected": "cd ef"},
    {"prompt": "10-1=? ", "chosen": "9 = 9", "rejected": "8"},
    {"prompt": "4*2= ", "chosen": "8", "rejected": "42 - 2"},
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
    for row in PAIRS
    for key in ("chosen", "rejected")
]


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    """Write rows as JSONL; return the file."""
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def trl_recipe(model: Path, algorithm: str, file: Path, **sections: Any) -> Recipe:
    """Return a recipe that learns from all rows of a file in each step; keys of its sections can be replaced."""
    values = recipe_of(model).model_dump() | {"algorithm": algorithm, "rewards": [], "evaluation": {}}
    values["data"] = {"train": str(file), "prompt": "prompt", "eval_size": 0, "chat": False}
    values["trl"] = {"max_length": 32, "beta": 0.3}
    values["training"] |= {"max_steps": 2}
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_recipe(values)


def loop_of(recipe: Recipe, folder: Path) -> TRLLoop:
    """Return the loop of a recipe as `session.train` makes it."""
    plan = running_plan(recipe)
    base = SharedBase.load(
        recipe.model,
        torch.device("cpu"),
        plan.settings.quantization,
        plan.settings.compute_dtype,
        r=4,
        lora_alpha=8,
        seed=recipe.training.seed,
    )
    add_roles(base, recipe, [])
    rows = load_rows(recipe.data, "train", recipe.training.seed)
    held_out = load_rows(recipe.data, "eval", recipe.training.seed) if recipe.data.eval_size else []
    path = folder / f"run-{len(list(folder.iterdir()))}"

    def directory(resolved: Recipe) -> RunDirectory:
        return RunDirectory.create(path, resolved, plan.to_dict(), False)

    return make_trl_loop(recipe, plan, base, [], read_data(recipe, rows, held_out, base.tokens), directory)


def step(loop: TRLLoop) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take a step; return its metrics, and the gradients (unscaled, unclipped) before it was taken."""
    found: dict[str, torch.Tensor] = {}
    take = loop.optimizer.step

    def spy(*loss: float, **before: float) -> float:
        scale = loop.optimizer.loss_scale
        found.update({name: p.grad / scale for name, p in loop.optimizer.parameters.items()})  # type: ignore[operator]
        return take(*loss, **before)

    loop.optimizer.step = spy  # type: ignore[method-assign]
    metrics = loop.one_step(Talk(1)).metrics
    loop.step += 1
    loop.optimizer.step = take  # type: ignore[method-assign]
    return metrics, found
