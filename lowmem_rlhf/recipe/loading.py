"""A recipe: what a run is, in one YAML file. Loads without torch.

Hyper-parameters carry TRL's names. ``auto`` leaves a setting to the plan. Unknown keys are refused with a suggestion
and every error of a recipe is shown at once.
"""

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from yaml import YAMLError

from lowmem_rlhf.algorithms.registry import is_own, known_own, load_own
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.paths import obstacle
from lowmem_rlhf.progress import message
from lowmem_rlhf.recipe.errors import explain
from lowmem_rlhf.recipe.overrides import apply_override
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import (
    LEARNED_REWARDS,
    REWARD_ADAPTER,
    REWARD_OPTIONS,
    AdapterRewardConfig,
    Auto,
    ClassifierReward,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    HardwareConfig,
    LearnedReward,
    LoraSettings,
    RewardConfig,
    SimilarityReward,
    TrainingConfig,
)
from lowmem_rlhf.recipe.values import read_values
from lowmem_rlhf.recipe.yaml_tree import BadYAML, Scalar, Tree, read_yaml, write_yaml
from lowmem_rlhf.resources import shipped
from lowmem_rlhf.suggest import did_you_mean

__all__ = [
    "LEARNED_REWARDS",
    "REWARD_ADAPTER",
    "REWARD_OPTIONS",
    "AdapterRewardConfig",
    "Auto",
    "ClassifierReward",
    "DataConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "HardwareConfig",
    "LearnedReward",
    "LoraSettings",
    "Recipe",
    "RewardConfig",
    "SimilarityReward",
    "TrainingConfig",
    "find_recipe",
    "load_recipe",
    "shipped_recipes",
    "validate_recipe",
]


_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst")  # files of data


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe given by path or by the name of a shipped one.

    Raises:
        UserError: there is no such recipe.
    """
    if recipe in (known := shipped_recipes()):
        return known[recipe]
    path = Path(recipe)
    if not recipe.strip():
        raise UserError(
            f"recipe: got {recipe!r}; give a recipe's file, or the name of a shipped one: {', '.join(known)}"
        )
    if why := obstacle(path):
        raise UserError(f"recipe {recipe!r} {why}; give a recipe's file, or the name of a shipped one")
    if path.name.lower().endswith(_ROWS):
        raise UserError(
            f"recipe {recipe!r} has the ending of a data file; give a recipe (a shipped one: {', '.join(known)}), and "
            f"the file as data.train={recipe}"
        )
    if path.is_file():
        return path
    if path.is_dir():
        inside = [file for file in sorted(path.iterdir()) if file.suffix in (".yaml", ".yml")]
        hint = f"; did you mean {inside[0]}?" if len(inside) == 1 else ""
        raise UserError(f"recipe {recipe!r} is a folder; give the recipe's file, or the name of a shipped one{hint}")
    near = [path.parent / f"{stem}{ending}" for stem in (path.stem, path.name) for ending in (".yaml", ".yml")]
    hint = next((f"; did you mean {str(file)!r}?" for file in near if file.is_file()), "")
    raise UserError(
        f"recipe {recipe!r} is neither a file nor a shipped recipe ({', '.join(known)})"
        f"{hint or did_you_mean(path.stem, known)}"
    )


def load_recipe(
    recipe: str, overrides: list[str] | None = None, quiet: bool = False, without: Sequence[str] = ()
) -> Recipe:
    """Load a recipe and apply dotted overrides such as ``training.learning_rate=1e-5`` or ``rewards[0].weight=2``.

    What may not be meant (a backslash and an n in a template) is a message, unless ``quiet``. ``without`` names keys
    (``section.key``) of the file that are left out.

    Raises:
        UserError: no such recipe, not YAML, or values the schema refuses (all of them in one message).
    """
    path = find_recipe(recipe)
    tree = _left_out(_read(path), without)
    _know_algorithms(tree, overrides or [], path.parent if _is_run(path) else None)
    return _resolved(tree, str(recipe), path.stem, overrides or [], _is_run(path), quiet)


def recipe_of(values: Mapping[str, Any], overrides: Sequence[str] = (), without: Sequence[str] = ()) -> Recipe:
    """Return the recipe of plain values, as `load_recipe` does of a file.

    Raises:
        UserError: values or overrides that the schema refuses (all of them in one message), or values that no recipe
            can hold.
    """
    try:
        tree = read_yaml(write_yaml(dict(values)))
    except (BadYAML, YAMLError, TypeError) as error:
        raise UserError(f"recipe: the values cannot be written as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError("recipe: got no keys; give at least model and data")
    _know_algorithms(tree, overrides, None)
    return _resolved(_left_out(tree, without), "given as a dict", "run", overrides, False, quiet=False)


def _left_out(tree: dict[str, Tree], without: Sequence[str]) -> dict[str, Tree]:
    for name in without:
        section, _, key = name.partition(".")
        if isinstance(inside := tree.get(section), dict):
            inside.pop(key, None)
    return tree


def _resolved(
    tree: dict[str, Tree], source: str, name: str, overrides: Sequence[str], of_a_run: bool, quiet: bool
) -> Recipe:
    in_file = _lengths(("training",), tree.get("training"))
    given: _Given = {}
    for override in overrides:
        for key, there in _lengths(*apply_override(tree, override, Recipe)).items():
            given.pop(key, None)  # the order is that of the last time
            given[key] = there
    reading = read_values(tree, Recipe)
    reading.problems |= _one_length(reading.values, in_file, given, of_a_run)
    if not quiet:
        for note in reading.notes:
            message(f"note: {note}")
    reading.values["name"] = reading.values.get("name") or name
    return _checked(reading.values, source, reading.problems)


def _know_algorithms(tree: dict[str, Tree], overrides: Sequence[str], run: Path | None) -> None:
    """Register the user's own algorithms that are named, whose sections are keys of the recipe.

    Args:
        tree: of the recipe.
        run: the run directory that the recipe lies in.
    """
    named = tree.get("algorithm")
    overridden = [value for key, _, value in (one.partition("=") for one in overrides) if key.strip() == "algorithm"]
    written = overridden[-1:] or ([named.text] if isinstance(named, Scalar) else [])
    for name in filter(is_own, written):
        load_own(name.strip(), run)


def _read(path: Path) -> dict[str, Tree]:
    try:
        data = path.read_bytes()
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell writes
        tree = read_yaml(data.decode("utf-16" if wide else "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"recipe {path} cannot be read as YAML: it is not text in UTF-8 (byte {error.start} is "
            f"0x{error.object[error.start]:02X})"
        ) from None
    except (BadYAML, OSError) as error:
        raise UserError(f"recipe {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if isinstance(tree, Scalar) and tree.is_null:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} is not a mapping of keys to values")
    return tree


_LENGTHS = ("max_steps", "num_train_epochs")
_Given = dict[str, bool]  # which of them are given; False: as null


def _lengths(place: Sequence[str | int], value: Tree | None) -> _Given:
    """Return which of the two lengths of a run are given at a place."""
    if tuple(place[:1]) != ("training",):
        return {}
    inside = {place[1]: value} if len(place) == 2 else value
    if not isinstance(inside, dict):
        return {}
    lengths = {str(key): one for key, one in inside.items() if key in _LENGTHS and one is not None}
    return {key: not (isinstance(one, Scalar) and one.is_null) for key, one in lengths.items()}


def _one_length(values: dict[str, Any], in_file: _Given, given: _Given, of_a_run: bool) -> dict[str, str]:
    """Leave the length that was given later in the values; return what is wrong where a file gives two.

    Args:
        values: of the recipe.
        in_file: what its file gives.
        given: what the overrides give, in their order.
        of_a_run: it is a run's own recipe; older ones hold epochs and the steps that came of them.
    """
    last = next((key for key in reversed(given) if given[key]), None)
    written = [key for key in _LENGTHS if in_file.get(key)]
    if last is None and len(written) > 1 and not of_a_run:
        return {"training.max_steps, training.num_train_epochs": "got both; a run has one length, leave one out"}
    chosen = last or ("num_train_epochs" if "num_train_epochs" in written else next(iter(written), None))
    if chosen is not None and isinstance(section := values.get("training"), dict):
        section.pop(next(key for key in _LENGTHS if key != chosen), None)
    return {}


def _is_run(path: Path) -> bool:
    return path.name == "recipe.yaml" and (path.parent / "plan.json").is_file()


def validate_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Check plain values against the schema.

    Raises:
        UserError: one message with every error.
    """
    known_own(values.get("algorithm"))
    return _checked(values, source, {})


def _checked(values: dict[str, Any], source: str, problems: dict[str, str]) -> Recipe:
    lines = [f"{key}: {problem}" for key, problem in problems.items()]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines += [line for line in explain(error.errors(), Recipe) if line.split(": ")[0] not in problems]
    if not lines:
        return recipe
    head = f"recipe {source} has {'an error' if len(lines) == 1 else f'{len(lines)} errors'}:"
    raise UserError("\n".join([head, *(f"  {line}" for line in lines)]))
