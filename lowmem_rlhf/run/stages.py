"""Runs that continue another run: how to get one that is missing or not finished yet. No torch here."""

import shlex
from pathlib import Path

from lowmem_rlhf.algorithms.registry import find_spec

RUNS = "runs"  # where runs are by default


def first_stage(reference: str) -> str:
    """Return how to make the run that a path lies in, as the end of a sentence; nothing if no recipe makes it.

    Args:
        reference: a path of a run, or of something in it, such as ``runs/NAME/model``.
    """
    from lowmem_rlhf.recipe.loading import shipped_recipes

    parts = Path(reference).parts
    places = [index for index, part in enumerate(parts[:-1]) if part == RUNS]
    if not places or parts[places[-1] + 1] not in shipped_recipes():
        return ""
    end = places[-1] + 2
    name, run = parts[end - 1], Path(*parts[:end])
    if (opened := run_of(run)) is not None:
        return f"; the run in {run} is not finished: {to_finish(opened)}"
    option = "" if parts[: end - 1] == (RUNS,) else f" --output {shlex.quote(str(run))}"
    return f"; run the recipe {name} first: lowmem-rlhf train {name}{option}"


def to_finish(run: Path) -> str:
    """Return how to finish the run in a folder: with a command if its recipe ships with this package."""
    from lowmem_rlhf.recipe.loading import shipped_recipes
    from lowmem_rlhf.run.directory import RunDirectory

    values = RunDirectory(run).recipe_values()
    name, place = str(values.get("name", "")), shlex.quote(str(run))
    known = name in shipped_recipes()
    spec = find_spec(values.get("algorithm"))
    if spec is not None and not spec.resumable:
        again = f": lowmem-rlhf train {name} --output OTHER" if known else " with another --output"
        return f"a {spec.title}'s run cannot be continued, start it anew{again}"
    if known:
        return f"let it finish first: lowmem-rlhf train {name} --output {place} --resume"
    return f"let it finish first (the `train` that began it, with --output {place} --resume, goes on)"


def run_of(folder: Path) -> Path | None:
    """Return a folder if it is a run directory; an export has a recipe too, beside a model or an adapter."""
    others = ("config.json", "adapter_config.json", "export.json")
    is_run = (folder / "recipe.yaml").is_file() and not any((folder / name).is_file() for name in others)
    return folder if is_run else None
