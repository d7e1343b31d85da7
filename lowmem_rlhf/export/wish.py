"""What is asked for: the options of `export`, and what is checked before anything costly. No torch here."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_rlhf.display.format import format_bytes
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.files import is_temp
from lowmem_rlhf.planning.memory.export import GGUF_BYTES, WIDTHS
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import MODEL, RunDirectory
from lowmem_rlhf.suggest import did_you_mean, spelled

ADAPTER, MERGED, GGUF, OLLAMA = FORMATS = ("adapter", "merged", "gguf", "ollama")
QUANTIZED, ORIGINAL = ONTO = ("quantized", "original")
EXPORT = "export.json"
DEFAULT_GGUF = "q8_0"


@dataclass(frozen=True)
class Wish:
    """The options of an export; None leaves the choice to the program.

    Attributes:
        format: adapter, merged, gguf or ollama; a reward model is an adapter, anything else merged.
        onto: which weights the change is added to: ``quantized`` (the numbers that the run computed with) or
            ``original`` (the 16-bit ones).
        dtype: of merged weights.
        quantize: of a GGUF: f16, bf16, q8_0 or q4_k_m.
        output: the folder.
        step: of a checkpoint.
        heads: a critic or a score head goes along.
        device: as in a recipe.
        push: a repository on the Hub.
    """

    format: str | None = None
    onto: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    output: Path | None = None
    step: int | None = None
    heads: bool = False
    device: str | None = None
    push: str | None = None


def check_wish(wish: Wish, recipe: Recipe, run: RunDirectory) -> Wish:
    """Return the wish with its defaults.

    Raises:
        UserError: an option is not known, does not go with the format, or the run has nothing of the kind.
    """
    known = (("format", FORMATS), ("onto", ONTO), ("dtype", tuple(WIDTHS)), ("quantize", tuple(GGUF_BYTES)))
    given: dict[str, Any] = {name: spelled(one, allowed) for name, allowed in known if (one := getattr(wish, name))}
    wish = replace(wish, **given)
    for name, allowed in known:
        value = getattr(wish, name)
        if value is not None and value not in allowed:
            raise UserError(f"--{name}: got {value!r}; give {', '.join(allowed)}{did_you_mean(value, allowed)}")
    judges = recipe.spec.output == "scores"
    wish = replace(wish, format=wish.format or (ADAPTER if judges else MERGED))
    if recipe.spec.leaves == MODEL:
        raise UserError(
            f"the run in {run.path} trained a {recipe.spec.title} whole: {run.path / MODEL} is the model itself"
        )
    if judges and wish.format != ADAPTER:
        raise UserError(
            f"--format {wish.format}: the run in {run.path} trained a reward model, whose scores come from an adapter "
            "and a head; take --format adapter"
        )
    is_gguf = wish.format in (GGUF, OLLAMA)
    fitting = (("onto", wish.format != ADAPTER), ("dtype", wish.format == MERGED), ("quantize", is_gguf))
    for name, fits in fitting:
        if getattr(wish, name) is not None and not fits:
            other = "; a GGUF's numbers are chosen with --quantize" if name == "dtype" and is_gguf else ""
            raise UserError(f"--{name} has no meaning with --format {wish.format}; leave it out{other}")
    if wish.heads and is_gguf:
        raise UserError(f"--heads: a GGUF holds no value or score heads; take --format {MERGED} or {ADAPTER}")
    if wish.push:
        from lowmem_rlhf.export.push import check_push

        check_push(wish.push)
    return replace(
        wish,
        onto=None if wish.format == ADAPTER else wish.onto or (ORIGINAL if is_gguf else QUANTIZED),
        quantize=wish.quantize or DEFAULT_GGUF if is_gguf else None,
        heads=wish.heads or judges,
    )


def check_target(target: Path) -> None:
    """Check that an export may appear there: an older export is replaced, and nothing else.

    Raises:
        UserError: it may not.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file, not a folder; choose another one with --output")
    if target.is_dir() and not (target / EXPORT).is_file():
        foreign = sorted(path.name for path in target.iterdir() if not is_temp(path))
        if foreign:
            raise UserError(
                f"output folder {target} is not empty and holds no export ({', '.join(foreign[:3])}); choose another "
                "one with --output"
            )


def free_disk(target: Path) -> int:
    """Return the bytes that are free where a folder is to be."""
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_disk(needed: int, target: Path) -> None:
    """Check that an export fits on the disk, beside an older one until that is replaced.

    Raises:
        RunError: it does not.
    """
    free = free_disk(target)
    if needed > free:
        raise RunError(
            f"the export needs {format_bytes(needed)} ({needed:,} bytes) on the disk of {target} and "
            f"{format_bytes(free)} ({free:,} bytes) are free; make room, or choose a folder on another disk with "
            "--output"
        )
