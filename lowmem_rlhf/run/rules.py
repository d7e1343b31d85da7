"""When a run may begin in a folder or go on there, and from which checkpoint. Nothing is written; no torch here."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import is_temp
from lowmem_rlhf.recipe.field_roles import keys_with
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.checkpoints import read_checkpoint
from lowmem_rlhf.run.lock import LOCK
from lowmem_rlhf.run.proof import HASHES, Damaged
from lowmem_rlhf.run.reading import INPUTS, PLAN, RECIPE, RunReader
from lowmem_rlhf.run.text_files import changed_text_files

# What a resume may change: how long, how often and where, never what is learned.
MAY_CHANGE = keys_with(Recipe, may_change_on_resume=True)
# of desktops, of a run that is about to begin, and of one that could not
_NOT_FOREIGN = {".DS_Store", "Thumbs.db", "desktop.ini", LOCK, HASHES}


class Found(NamedTuple):
    """What a resume finds: the latest checkpoint that is whole, and the damaged ones after it with what is wrong."""

    latest: tuple[int, Path] | None
    damaged: list[tuple[Path, str]]


def check_new(run: RunReader) -> None:
    """Check that a run may begin there.

    Raises:
        UserError: another run or foreign files are there, or a file.
    """
    if not run.path.exists():
        return
    if not run.path.is_dir():
        raise UserError(f"output {run.path} is a file, not a folder; choose another one with --output")
    if run.holds_run():
        raise UserError(
            f"output folder {run.path} already holds a run; continue it with --resume, or choose another folder "
            "with --output"
        )
    foreign = sorted(p.name for p in run.path.iterdir() if not is_temp(p) and p.name not in _NOT_FOREIGN)
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(
            f"output folder {run.path} is not empty and holds no run ({shown}); choose another one with --output"
        )


def check_there(run: RunReader) -> None:
    """Check that there is a run to go on with.

    Raises:
        UserError: there is none.
    """
    if not run.holds_run():
        raise UserError(
            f"--resume: there is no run in {run.path}; name the run's folder with --output, or start one "
            "without --resume"
        )


def check_resume(run: RunReader, recipe: Recipe) -> None:
    """Check that a recipe may go on with a run.

    Raises:
        UserError: there is none, its files were changed, or the recipe differs in what is learned.
    """
    check_there(run)
    check_text_files(run)
    saved = _flatten(run.recipe().model_dump())
    wanted = _flatten(recipe.model_dump())
    lines = [
        f"  {key}: was {saved.get(key, 'absent')!r}, is now {wanted.get(key, 'absent')!r}"
        for key in dict.fromkeys([*saved, *wanted])
        if saved.get(key) != wanted.get(key) and not _may_change(key)
    ]
    if lines:
        head = f"--resume: the recipe differs from the one that the run in {run.path} began with:"
        whole = [key for key in MAY_CHANGE if key.endswith(".*")]
        single = [key for key in MAY_CHANGE if key not in whole]
        tail = (
            "Undo these changes, or start a new run with another --output (a resume may change "
            f"{', '.join(single)} and {', '.join(whole)})."
        )
        raise UserError("\n".join([head, *lines, tail]))


def _may_change(key: str) -> bool:
    """Whether a resume may change the key of a flattened recipe."""
    key = re.sub(r"^tasks\[\d+\]\.", "", key)  # of one of several tasks, as of a single one
    names = {re.sub(r"\[\d+\]", "[]", key), f"{key.partition('.')[0]}.*"}
    return bool(names.intersection(MAY_CHANGE))


def check_text_files(run: RunReader) -> None:
    """Check that what a resume computes from is what the run wrote.

    Raises:
        UserError: recipe.yaml, plan.json or inputs.json was changed by something else.
    """
    for name in changed_text_files(run.path):
        if name in (RECIPE, PLAN, INPUTS):
            raise UserError(
                f"--resume: {run.path / name} is not what the run wrote (it is damaged, gone or was edited); put "
                f"it back from a copy, or delete {run.path / HASHES} if it is to be taken as it is"
            )


def find_checkpoint(run: RunReader) -> Found:
    """Return the latest checkpoint that is what was written, and the damaged ones after it.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for step, folder in reversed(run.checkpoints()):
        try:
            read_checkpoint(folder)
        except Damaged as damage:
            damaged.append((folder, str(damage)))
        else:
            return Found((step, folder), damaged)
    if damaged:
        lines = "; ".join(f"{folder.name}: {what}" for folder, what in damaged)
        raise UserError(
            f"--resume: no checkpoint of the run in {run.path} is whole ({lines}); put one back from a copy, or "
            "start a new run with another --output"
        )
    return Found(None, [])


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted keys as overrides write them, for example ``rewards[0].weight``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                flat |= _flatten(item, f"{prefix}{key}[{index}].")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
