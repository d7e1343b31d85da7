"""The shape of a saved adapter, as its configuration and the layers in its file tell it together. No torch here."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.adapter_files import CONFIG, PREFIX, check_ranks, is_scale, tensors_of
from lowmem_rlhf.architecture.families.wrappers import text_key
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.lora_shape import ALL, LoraShape, ends_with, fits, layer_number


def layers_of(folder: Path) -> set[str]:
    """Return the names of the layers that an adapter's file has tensors of, without the prefix of all names.

    Raises:
        UserError: it cannot be read.
    """
    return {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors_of(folder)}


def saved_shape(reference: str, folder: Path, config: Mapping[str, Any]) -> LoraShape:
    """Return a saved adapter's shape.

    What its configuration names and its file does not have is left out: peft writes what it would have taken. Where
    names do not say which layers these are (modules that are left out by a pattern, names of a model for images or
    sound) they are listed one by one.

    Raises:
        UserError: the two files do not belong together, or the configuration has no rank.
    """
    r, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1 or not is_scale(alpha):
        raise UserError(
            f"adapter {reference!r}: {CONFIG} must have a whole number above 0 as r and a number above 0 as lora_alpha "
            f"(finite); got {r!r} and {alpha!r}"
        )
    numbers = config.get("layers_to_transform")
    shape = LoraShape.of(
        r,
        float(alpha),  # type: ignore[arg-type]
        config.get("target_modules") or ALL,
        bool(config.get("use_rslora")),
        numbers if isinstance(numbers, list) else None if numbers is None else [numbers],
        config.get("rank_pattern"),
        config.get("alpha_pattern"),
    )
    check_ranks(reference, folder, shape)
    return _of_file(shape, layers_of(folder), config.get("exclude_modules") or [])


def _of_file(shape: LoraShape, layers: set[str], excluded: str | list[str]) -> LoraShape:
    renamed = {layer: text_key(PREFIX + layer).removeprefix(PREFIX) for layer in sorted(layers)}
    numbers = {layer_number(layer) for layer in layers}
    by_pattern = isinstance(excluded, str) or any("." in name for name in excluded)
    if by_pattern or set(renamed.values()) != layers or not _numbers_say(shape, numbers):
        return replace(
            shape,
            target_modules=tuple(sorted(renamed.values())),
            layers_to_transform=(),
            rank_pattern=tuple((to, shape.rank(layer)) for layer, to in renamed.items() if shape.rank_pattern),
            alpha_pattern=tuple((to, shape.alpha(layer)) for layer, to in renamed.items() if shape.alpha_pattern),
        )
    targets = shape.target_modules
    if isinstance(targets, tuple):
        there = (name for name in targets if any(ends_with(layer, name) for layer in layers))
        targets = tuple(sorted(name for name in there if name.rsplit(".", 1)[-1] not in excluded))
    return replace(
        shape,
        target_modules=targets,
        layers_to_transform=tuple(sorted(n for n in numbers if n is not None)) if shape.layers_to_transform else (),
        rank_pattern=tuple(one for one in shape.rank_pattern if any(fits(one[0], layer) for layer in layers)),
        alpha_pattern=tuple(one for one in shape.alpha_pattern if any(fits(one[0], layer) for layer in layers)),
    )


def _numbers_say(shape: LoraShape, numbers: set[int | None]) -> bool:
    """Whether the first numbers in the layers' names are those that the configuration chooses."""
    return not shape.layers_to_transform or numbers <= set(shape.layers_to_transform)
