"""The files of a saved adapter, in peft's format: whether each is whole, and they belong together. No torch here."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowmem_rlhf.architecture.weight_files import FLOATS
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.lora_shape import LoraShape
from lowmem_rlhf.run.stages import run_of

WEIGHTS, CONFIG, HEAD = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"
PREFIX = "base_model.model."  # of all names in the file


def is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def check_fields(reference: str, config: dict[str, Any]) -> None:
    """Check that what an adapter's configuration says is of the kinds that peft writes.

    Raises:
        UserError: something is not.
    """

    def names(value: Any) -> bool:
        if isinstance(value, list):
            return all(isinstance(one, str) for one in value)
        return isinstance(value, str) and _is_regex(value)

    def numbers(value: Any) -> bool:
        return all(isinstance(one, int) and one >= 0 for one in (value if isinstance(value, list) else [value]))

    def pattern(value: Any) -> bool:
        return isinstance(value, dict) and all(_is_regex(key) and is_scale(one) for key, one in value.items())

    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(("target_modules", "exclude_modules"), (names, "a list of names, or a pattern")),
        **dict.fromkeys(
            ("rank_pattern", "alpha_pattern"), (pattern, "names or patterns of layers with a number above 0 each")
        ),
        "layers_to_transform": (numbers, "numbers of layers"),
        **dict.fromkeys(("peft_type", "base_model_name_or_path", "revision", "bias"), (_is_text, "a text")),
    }
    for key, (fits, what) in wanted.items():
        if config.get(key) is not None and not fits(config[key]):
            raise UserError(
                f"adapter {reference!r}: {CONFIG} has {config[key]!r} as {key}, where peft has {what}; the file is "
                "damaged or was written by hand: fetch the adapter again"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def other_tensors(folder: Path) -> list[str]:
    """Return the tensors of an adapter's file that are no matrix of a low-rank product."""
    return sorted(name for name in tensors_of(folder) if not re.search(r"\.lora_[AB]\.weight$", name))


def check_ranks(reference: str, folder: Path, shape: LoraShape) -> None:
    """Check that the tensors of an adapter's file are pairs of matrices of the ranks of its shape.

    Raises:
        UserError: they are not, or cannot be read.
    """
    tensors = {name: told for name, told in tensors_of(folder).items() if re.search(r"\.lora_[AB]\.", name)}
    if not tensors:
        raise UserError(
            f"adapter {reference!r}: {WEIGHTS} holds no matrix of an adapter (lora_A, lora_B); fetch it again"
        )
    for name, (dtype, sizes) in sorted(tensors.items()):
        if dtype not in FLOATS:
            raise UserError(f"adapter {reference!r}: {name} is of {dtype}, and not of floating-point numbers")
        r = shape.rank(name.removeprefix(PREFIX).rsplit(".lora_", 1)[0])
        rank = sizes[0 if ".lora_A." in name else -1] if len(sizes) == 2 else r
        if rank != r:
            said = f"r={r}" if r == shape.r else f"{r} in its rank_pattern"
            said += f" (rank_pattern {dict(shape.rank_pattern)})" if r == shape.r and shape.rank_pattern else ""
            raise UserError(
                f"adapter {reference!r}: {CONFIG} says {said}, and {name} is of rank {rank} ({tuple(sizes)}); the two "
                "files do not belong together: fetch the adapter again"
            )


def tensors_of(folder: Path, name: str = WEIGHTS) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of each tensor of an adapter's file, or of another one beside it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(folder / name, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (one.get_dtype(), list(one.get_shape())) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        of_run = run_of(folder.parent) or run_of(folder.parent.parent)
        remedy = "take a checkpoint" if of_run else "it may be cut short, or a pointer of Git LFS: fetch it again"
        also = " (chat, eval and export: --step N)" if of_run else ""
        raise UserError(f"adapter {folder}: {name} cannot be read ({error}); {remedy}{also}") from error
