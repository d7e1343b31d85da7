"""A page for each shipped recipe, made of its file, its plan on some cards, and its twin that runs on a CPU."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keys import Key, all_keys

from lowmem_rlhf.display.format import format_bytes
from lowmem_rlhf.errors import LowmemError
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes
from lowmem_rlhf.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
CARDS = ("rtx-2060-6gb", "rtx-2080-ti", "t4", "rtx-4090")
# what is worth changing first, of all recipes; a page has those that its algorithm reads
WORTH = (
    *("model", "adapter", "data.train", "data.eval", "training.max_steps", "training.num_train_epochs"),
    *("training.prompts_per_step", "training.learning_rate", "generation.num_generations"),
    *("generation.max_completion_length", "generation.temperature", "evaluation.steps", "lora.r"),
)
OF_ALGORITHM = {
    "grpo": ("grpo.beta", "grpo.loss_type", "grpo.num_iterations"),
    "ppo": ("ppo.kl_coef", "ppo.num_ppo_epochs", "ppo.target_kl", "ppo.missing_eos_penalty"),
    "sft": ("sft.max_length", "sft.completion_only_loss"),
    "reward_model": ("reward_model.max_length", "reward_model.center_rewards_coefficient"),
    "classifier": ("classifier.max_length",),
}
OF_SAMPLING = ("generation.num_generations", "generation.temperature", "training.max_steps")


def pages() -> dict[str, str]:
    """Return the page of each shipped recipe by its name."""
    about = {key.name: key for key in all_keys()}
    return {name: _page(name, about) for name in shipped_recipes()}


def _page(name: str, about: dict[str, Key]) -> str:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    recipe = load_recipe(name, quiet=True)
    head = [line.removeprefix("#").strip() for line in text.split("\nname:")[0].splitlines() if line.startswith("#")]
    first = [f"lowmem-rlhf train {stage}" for stage in _stages(text)]
    planned = "" if recipe.spec.run else f"\nlowmem-rlhf plan {name}     # settings, reasons, memory and time"
    parts = [
        f"# {name}",
        " ".join(head) or recipe.description,
        "```\n" + "\n".join([*first, f"lowmem-rlhf train {name}"]) + planned + "\n```",
        _plans(name, recipe),
        f"## Keys worth changing\n\n{_worth(recipe, about)}",
        f"## The file\n\n```yaml\n{text.rstrip()}\n```",
        _twin(name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _stages(text: str) -> list[str]:
    """Return the recipes whose runs a recipe's file names, in the order in which they have to run."""
    return list(dict.fromkeys(re.findall(r"runs/(\w+)", text)))


def _plans(name: str, recipe: Recipe) -> str:
    if recipe.spec.run is not None:
        return ""
    rows = [
        "| card | weights | recomputed layers | tokens of a micro-batch | completions at once | peak | a step |",
        "|" + "---|" * 7,
    ]
    for card in CARDS:
        try:
            plan = plan_recipe(load_recipe(name, [f"hardware.profile={card}"], quiet=True))
        except LowmemError:  # sizes that are on the Hub alone
            return ""
        settings, seconds = plan.settings, plan.time.step if plan.time else None
        fits = format_bytes(plan.memory["peak_bytes"]) if plan.fits else "does not fit"
        layers = {True: "all", False: "none"}.get(settings.gradient_checkpointing, settings.gradient_checkpointing)
        rollout = settings.rollout_batch_size if recipe.spec.samples else "-"
        weights = {"none": "16-bit"}.get(settings.quantization, settings.quantization)
        step = f"{seconds:.2g} s" if seconds else "-"
        rows.append(f"| {card} | {weights} | {layers} | {settings.micro_batch_tokens} | {rollout} | {fits} | {step} |")
    return (
        "## On some cards\n\nPredicted, with the memory of each card free but for what a driver takes; texts of full "
        "length. Every setting with its reason: the command `plan` above with `--profile`.\n\n" + "\n".join(rows)
    )


def _worth(recipe: Recipe, about: dict[str, Key]) -> str:
    family = recipe.spec.section or ""
    names = [key for key in (*WORTH, *OF_ALGORITHM.get(family, ())) if recipe.spec.samples or key not in OF_SAMPLING]
    if recipe.spec.samples:
        names.remove("training.num_train_epochs")
    if recipe.spec.leaves == "model":
        names = [key for key in names if key not in ("adapter", "lora.r")]
    values = recipe.model_dump(mode="json")
    rows = ["| key | here | what it is |", "|---|---|---|"]
    for key in names:
        found = _value(values, key)
        if key.startswith("data.") and recipe.tasks:
            continue
        rows.append(f"| `{key}` | {'' if found is None else f'`{found}`'} | {about[key].about} |")
    return "\n".join(rows)


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _twin(name: str) -> str:
    """Return what the recipe's twin changes, as `benchmarks/twins.py` says it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from twins import DATA, TWINS
    finally:
        sys.path.pop(0)
    if name not in TWINS:
        return ""
    lines = "\n".join(
        line.replace(str(DATA), "DATA").replace(str(ROOT.parent / "FOLDER"), "FOLDER")
        for line in TWINS[name](ROOT.parent / "FOLDER")
    )
    return (
        "## On a CPU, without the Hub\n\nThe recipe's twin in [benchmarks/twins.py](../../benchmarks/twins.py) is the "
        f"same recipe with a 135M model, local data and fewer, smaller steps; the tests train it:\n\n```\n{lines}\n```"
    )


def names() -> Iterator[str]:
    """Yield the names of the shipped recipes, the quickstart first."""
    yield from sorted(shipped_recipes(), key=lambda name: (name != "quickstart", name))
