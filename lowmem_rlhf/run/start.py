"""Where a run was started: its recipe's paths are relative to that folder, wherever the run is opened. No torch here.

``local.json`` of the run directory holds the folder, and the run's id. It means something on this machine only, so no
export and no model card includes it.
"""

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

from lowmem_rlhf.algorithms.registry import find_spec
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import atomic_write, dumps
from lowmem_rlhf.recipe.data_sources import is_file, is_generated
from lowmem_rlhf.recipe.python_objects import is_python
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import RewardConfig

LOCAL = "local.json"
PATH_OPTIONS = ("model", "adapter")  # of rewards


def write_start(run: Path, recipe: Recipe) -> None:
    """Write the current folder into a run's local.json, unless that names a folder that still exists, and a new id.

    Args:
        run: the run directory.
        recipe: as it was written.
    """
    if start_folder(run) is not None:
        if run_id(run) is None:
            atomic_write(run / LOCAL, dumps({**_values(run), "id": uuid.uuid4().hex}, indent=2) + "\n")
        return
    here = Path.cwd()
    try:
        between = os.path.relpath(here, run.resolve())
    except ValueError:  # another drive of Windows
        between = None
    paths = [text for text in dict.fromkeys(_paths(recipe)) if _is_relative(text) and (here / text).exists()]
    values = {"id": run_id(run) or uuid.uuid4().hex, "start": str(here), "from_run": between, "paths": paths}
    atomic_write(run / LOCAL, dumps(values, indent=2) + "\n")


def _values(run: Path) -> dict[str, Any]:
    try:
        values = json.loads((run / LOCAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    known = {key: values[key] for key in ("id", "start", "from_run") if isinstance(values.get(key), str)}
    paths = values.get("paths")
    if isinstance(paths, list) and all(isinstance(one, str) for one in paths):
        known["paths"] = paths
    return known


def run_id(run: Path) -> str | None:
    """Return the id that a run was given when it began; None of one that has none."""
    known = str(_values(run).get("id"))
    return known if re.fullmatch(r"[0-9a-f]{32}", known) else None


def start_folder(run: Path) -> Path | None:
    """Return the folder that a run was started in, also if both have been moved together; None if it is gone."""
    values = _values(run)
    if (start := values.get("start")) and Path(start).is_dir():
        return Path(start).resolve()
    if values.get("from_run"):
        moved = (run.resolve() / str(values["from_run"])).resolve()
        if any((moved / text).exists() for text in values.get("paths") or ()):
            return moved
    return None


def map_paths(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """Return a recipe with `change` applied to every value that may be a path: models, adapters, data, code."""
    update: dict[str, Any] = {"model": change(recipe.model)}
    if recipe.adapter is not None:
        update["adapter"] = change(recipe.adapter)
    if (spec := find_spec(recipe.algorithm)) is not None and spec.functions:
        section = spec.own(recipe)
        functions = {key: _of_file(getattr(section, key), change) for key in spec.functions}
        update[spec.section] = section.model_copy(update=functions)
    return recipe.with_each(lambda _, own: _with_sources(own, change)).model_copy(update=update)


def _with_sources(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    sources: dict[str, Any] = {
        key: change(value) for key in ("train", "eval") if (value := getattr(recipe.data, key)) is not None
    }
    if (few := recipe.data.few_shot) is not None and few.file is not None:
        sources["few_shot"] = few.model_copy(update={"file": change(few.file)})
    data = recipe.data.model_copy(update=sources)
    rewards = [_mapped(reward, change) for reward in recipe.rewards]
    return recipe.model_copy(update={"data": data, "rewards": rewards})


def _of_file(function: str, change: Callable[[str], str]) -> str:
    """Return a ``path.py:function`` with its path changed; anything else as it is."""
    path, colon, name = function.rpartition(":")
    return f"{change(path)}:{name}" if colon and path.endswith(".py") else function


def _mapped(reward: RewardConfig, change: Callable[[str], str]) -> RewardConfig:
    paths = {key: reward.options[key] for key in PATH_OPTIONS if isinstance(reward.options.get(key), str)}
    options = {**reward.options, **{key: change(path) for key, path in paths.items()}}
    return reward.model_copy(update={"options": options, "function": _of_file(reward.function, change)})


def located(recipe: Recipe, run: Path, written: Recipe | None = None) -> Recipe:
    """Return a run's recipe with paths that work from the current folder: those below the start folder made absolute.

    Args:
        recipe: the run's, perhaps with changes of this command, whose paths are relative to the current folder.
        run: the run directory.
        written: the run's recipe without the changes; absent: there are none.
    """
    start = start_folder(run)
    if start is None or start == Path.cwd().resolve():
        return recipe
    unchanged = set(_paths(written)) if written else None

    def place(text: str) -> str:
        if not _is_relative(text) or (unchanged is not None and text not in unchanged):
            return text
        existing = [path for path in (start / text, start / text.replace("\\", "/")) if path.exists()]
        return str(existing[0]) if existing else text

    return map_paths(recipe, place)


def as_written(recipe: Recipe, written: Recipe, run: Path) -> Recipe:
    """Return a recipe with the paths that `located` made absolute as they were written."""
    names = dict(zip(_paths(located(written, run)), _paths(written), strict=True))
    return map_paths(recipe, lambda text: names.get(text, text))


def _paths(recipe: Recipe) -> list[str]:
    paths: list[str] = []

    def record(text: str) -> str:
        paths.append(text)
        return text

    map_paths(recipe, record)
    return paths


def _is_relative(text: str) -> bool:
    if is_generated(text) or is_python(text) or text.startswith(("package:", "~")):
        return False
    return not Path(text).is_absolute() and not PureWindowsPath(text).drive


@contextmanager
def paths_explained(run: Path, recipe: Recipe) -> Iterator[None]:
    """Add a note to an error about a missing path: which folder the run's paths are relative to.

    Args:
        run: the run directory.
        recipe: as it was written.
    """
    try:
        yield
    except UserError as error:
        if note := _explanation(run, recipe, str(error)):
            error.add_note(note)
        raise


def _explanation(run: Path, recipe: Recipe, message: str) -> str:
    start, values = start_folder(run), _values(run)
    if start == Path.cwd().resolve():
        return ""
    paths = values.get("paths") or [text for text in _paths(recipe) if _is_relative(text) and _names_file(text)]
    gone = [text for text in paths if not Path(text).exists() and not (start and (start / text).exists())]
    if not any(text in message for text in gone):
        return ""
    if start is not None:
        return f"the run was started in {start}; paths are relative to it"
    if recorded := values.get("start"):
        return f"the run was started in {recorded}, which is not there any more; paths are relative to it"
    return "paths of a run are relative to the folder that it was started in; go there"


def _names_file(text: str) -> bool:
    """Whether a text cannot be an id of the Hub, which has the form owner/name."""
    return text.startswith(".") or is_file(text) or text.endswith((".py", ".gguf")) or text.count("/") > 1
