"""What a caller of the Python API asks for, made into a recipe and the objects that it names. No torch here."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from lowmem_rlhf.data.memory import plain, table_of
from lowmem_rlhf.data.table import Table
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.inference.loaded import LoadedModel
from lowmem_rlhf.recipe.loading import load_recipe, recipe_of
from lowmem_rlhf.recipe.python_objects import PREFIX
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import check_reward_function

RecipeLike = str | Path | Mapping[str, Any] | Recipe
RewardLike = str | Callable[..., Any] | tuple[Any, float] | Mapping[str, Any]
Overrides = Sequence[str] | Mapping[str, Any]

TRAIN, EVAL = f"{PREFIX}data", f"{PREFIX}eval_data"
_OF_A_SOURCE = ("data.eval", "data.config", "data.field", "data.options")  # what a recipe says of its own data
_HELD_OUT = ("eval", "test", "validation")  # names of the split to evaluate on, the first that is there
HELD_OUT_SHARE = 4  # of rows that a program gives, one in so many is held out at most where nobody says how many


@dataclass(frozen=True)
class Request:
    """A recipe with the objects that a program gives in place of names.

    Attributes:
        recipe: names them ``python:NAME``.
        objects: tables of rows and reward functions by that name.
        loaded: a model that the program has loaded.
        notes: what is to be said of choices made here.
    """

    recipe: Recipe
    objects: dict[str, Any] = field(default_factory=dict)
    loaded: LoadedModel | None = None
    notes: tuple[str, ...] = ()


def request_of(
    recipe: RecipeLike,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    rewards: Sequence[RewardLike] | None = None,
    overrides: Overrides = (),
) -> Request:
    """Return the recipe that the arguments of `lowmem_rlhf.train` describe.

    Raises:
        UserError: an argument is of a kind that is not taken, or the recipe has errors (all of them in one message).
    """
    if isinstance(recipe, Mapping) and rewards is None and "rewards" in recipe:
        recipe = dict(recipe)
        rewards = recipe.pop("rewards")
    changes: dict[str, Any] = {}
    loaded = _model(model, tokenizer, changes)
    objects: dict[str, Any] = _objects(data, eval_data, changes)
    if isinstance(recipe, Mapping) and isinstance(recipe.get("tasks"), list | tuple):
        recipe = {**recipe, "tasks": [_task(one, objects) for one in recipe["tasks"]]}
    if rewards is not None:
        changes["rewards"], functions = reward_configs(rewards)
        objects |= functions
    texts = [*override_texts(changes), *override_texts(overrides)]
    source = _Source(recipe, _OF_A_SOURCE if data is not None else ())
    notes: tuple[str, ...] = ()
    if (note := _fewer_held_out(source, texts, objects)) is not None:
        texts.insert(0, note[0])
        notes = (note[1],)
    return Request(source.load(texts), objects, loaded, notes)


def given_objects(data: Any, eval_data: Any, rewards: Sequence[RewardLike] | None) -> dict[str, Any]:
    """Return by name the objects that a run was made with, given again to open it.

    Raises:
        UserError: one is of a kind that is not taken.
    """
    objects = _objects(data, eval_data, {})
    return objects | (reward_configs(rewards)[1] if rewards is not None else {})


def override_texts(overrides: Overrides) -> list[str]:
    """Return overrides as a command line writes them: ``KEY=VALUE``.

    Args:
        overrides: texts of that form, or values by dotted key.

    Raises:
        UserError: it is neither, or a value has no form in YAML.
    """
    if isinstance(overrides, str) or not isinstance(overrides, Mapping | Iterable):
        raise UserError(f"overrides: got {overrides!r}; give a list such as ['training.max_steps=10'], or a dict")
    if not isinstance(overrides, Mapping):
        texts = list(overrides)
        if wrong := [one for one in texts if not isinstance(one, str)]:
            raise UserError(f"overrides: got {wrong[0]!r} in the list; an override is a text, 'training.max_steps=10'")
        return texts
    return [f"{key}={_text(key, value)}" for key, value in overrides.items()]


def _text(key: str, value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    try:
        return json.dumps(value, default=plain)  # numbers and arrays of numpy's
    except (TypeError, ValueError) as error:
        raise UserError(f"overrides: {key}: got a {type(value).__name__}, which no recipe can hold") from error


def reward_configs(rewards: Sequence[RewardLike]) -> tuple[list[dict[str, Any]], dict[str, Callable[..., Any]]]:
    """Return rewards as a recipe has them, and the functions among them by the name that the recipe gives them.

    Args:
        rewards: each a name (or ``path.py:function``), a function, a pair of either with its weight, or a mapping with
            the keys of a recipe's reward, of which ``function`` may be a function.

    Raises:
        UserError: one is something else, is no reward function, or has no name of its own.
    """
    if isinstance(rewards, str | Mapping) or not isinstance(rewards, Iterable):
        raise UserError(f"rewards: got {rewards!r}; give a list, for example ['gsm8k_answer', (my_function, 0.1)]")
    configs: list[dict[str, Any]] = []
    functions: dict[str, Callable[..., Any]] = {}
    for one in rewards:
        config = dict(_reward(one))
        function = config.get("function")
        if function is not None and not isinstance(function, str):
            name = str(config.get("name") or _name_of(function))
            check_reward_function(function, name)
            if f"{PREFIX}{name}" in (TRAIN, EVAL):
                raise UserError(f"rewards: a function is called {name!r}, as the rows are; give it another name")
            if functions.get(f"{PREFIX}{name}", function) is not function:
                raise UserError(f"rewards: two functions are called {name!r}; give one a name: {{'name': ...}}")
            config["function"] = f"{PREFIX}{name}"
            functions[config["function"]] = function
        configs.append(config)
    return configs, functions


def _task(task: Any, objects: dict[str, Any]) -> Any:
    """Return a task of a recipe given as a dict, with names for its rows and functions, which go into ``objects``."""
    if not isinstance(task, Mapping):
        return task
    named, data = dict(task), task.get("data")
    if isinstance(data, Mapping):
        place = f"{PREFIX}{task.get('name')}"
        rows = {key: data[key] for key in ("train", "eval") if data.get(key) is not None}
        sources = {key: _source(one, f"{place}_{key}", f"{key} rows", objects) for key, one in rows.items()}
        named["data"] = {**data, **sources}
    if task.get("rewards"):
        named["rewards"], functions = reward_configs(task["rewards"])
        for name, function in functions.items():
            if objects.setdefault(name, function) is not function:
                raise UserError(f"rewards: two functions are called {name.removeprefix(PREFIX)!r}; give one a name")
    return named


def _reward(one: RewardLike) -> Mapping[str, Any]:
    if isinstance(one, Mapping):
        if "function" not in one:
            raise UserError(f"rewards: got {dict(one)!r} without `function`; give {{'function': ..., 'weight': ...}}")
        return one
    if isinstance(one, tuple):
        if len(one) != 2 or isinstance(one[1], bool) or not isinstance(one[1], Real):
            raise UserError(f"rewards: got {one!r}; a pair is a function (or its name) with its weight, a number")
        return {"function": one[0], "weight": float(one[1])}
    return {"function": one}


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", None) or getattr(getattr(function, "func", None), "__name__", None)
    name = name or type(function).__name__
    if not str(name).isidentifier():
        raise UserError(
            "rewards: a function without a name of its own was given; write it with def, or give "
            "{'function': ..., 'name': ...}"
        )
    return str(name)


def _model(model: Any, tokenizer: Any, changes: dict[str, Any]) -> LoadedModel | None:
    if model is None or isinstance(model, str | Path):
        if tokenizer is not None:
            raise UserError("tokenizer: is for a model that is loaded already; a model by name brings its own")
        if model is not None:
            changes["model"] = model
        return None
    loaded = LoadedModel(model, tokenizer)
    changes |= loaded.overrides()
    return loaded


def _objects(data: Any, eval_data: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Return tables by name, and put into ``changes`` what the recipe says of them."""
    objects: dict[str, Any] = {}
    if isinstance(data, Mapping) and "train" in data:  # splits by name
        if (unknown := set(data) - {"train", *_HELD_OUT}) and not hasattr(data, "column_names"):
            raise UserError(f"data: got the split {min(map(str, unknown))!r}; splits are train and eval (or test)")
        if data["train"] is None:
            raise UserError("data: got None as the split 'train'; give rows, a path or a Hub id")
        if eval_data is None:
            eval_data = next((data[name] for name in _HELD_OUT if name in data), None)
        data = data["train"]
    if data is not None:
        changes["data.train"] = _source(data, TRAIN, "data", objects)
    if eval_data is not None:
        changes["data.eval"] = _source(eval_data, EVAL, "eval_data", objects)
    return objects


def _source(rows: Any, name: str, argument: str, objects: dict[str, Any]) -> str:
    if isinstance(rows, str | Path):
        return str(rows)
    objects[name] = table_of(rows, argument)
    return name


def _fewer_held_out(source: "_Source", texts: list[str], objects: dict[str, Any]) -> tuple[str, str] | None:
    """Hold out less than the recipe says where a program gives few rows, and no override says how many."""
    table = objects.get(TRAIN)
    if not isinstance(table, Table) or EVAL in objects or any(text.startswith("data.eval_size=") for text in texts):
        return None
    wanted = source.load(texts).data.eval_size
    most = len(table) // HELD_OUT_SHARE
    if wanted <= most:
        return None
    said = (
        f"{most} of the {len(table)} rows given are held out; data.eval_size (the recipe says {wanted}) sets how many"
    )
    return f"data.eval_size={most}", said


@dataclass(frozen=True)
class _Source:
    """A recipe that is not resolved yet, and its keys that no longer hold."""

    recipe: RecipeLike
    without: tuple[str, ...]

    def load(self, texts: list[str]) -> Recipe:
        recipe = self.recipe
        if isinstance(recipe, Recipe):
            return recipe_of(recipe.model_dump(exclude_unset=True), texts, self.without)
        if isinstance(recipe, Mapping):
            return recipe_of(recipe, texts, self.without)
        if isinstance(recipe, str | Path):
            return load_recipe(str(recipe), texts, without=self.without)
        raise UserError(f"recipe: got a {type(recipe).__name__}; give a shipped name, a path, or a dict of its keys")
