"""The sizes of the models that people train on consumer cards, without a network: `catalogue.json`, read on demand."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_rlhf.architecture.counting import Counted
from lowmem_rlhf.architecture.dimensions import ModelDimensions, dimensions_from_config

FILE = Path(__file__).with_name("catalogue.json")


class Entry(NamedTuple):
    """What the catalogue knows of a Hub id.

    Attributes:
        series: what its models are called together, such as Qwen2.5.
        parameters: the published count.
        config: the fields of its config.json that decide memory.
        counted: what was counted on its class, where its layers are of unlike sizes or its terms are not known.
    """

    series: str
    parameters: int
    config: dict[str, Any]
    counted: Counted | None


@cache
def _models() -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["models"]
    return models


@cache
def entries() -> dict[str, Entry]:
    """Return the config of every Hub id that the catalogue knows, in the order of the file."""
    by_name: dict[str, Entry] = {}
    for model in _models():
        counted = Counted.from_json(model["counted"]) if "counted" in model else None
        same = dict.fromkeys(model["names"], model["config"])
        others = {name: {**model["config"], **changes} for name, changes in model.get("variants", {}).items()}
        for name, config in {**same, **others}.items():
            by_name[name] = Entry(model["series"], model["parameters"], config, counted)
    return by_name


@cache
def find(model: str) -> ModelDimensions | None:
    """Return the sizes of a Hub id, in any case; None where the catalogue does not have it."""
    name = next((known for known in entries() if known.casefold() == model.casefold()), None)
    return None if name is None else _sizes(name)


@cache
def catalogue() -> dict[str, ModelDimensions]:
    """Return the sizes of every model, under the one of its names to suggest: the instruct model where there is one."""
    firsts = [model["names"][0] for model in _models()]
    return {name: _sizes(name) for name in firsts}


def _sizes(name: str) -> ModelDimensions:
    entry = entries()[name]
    return dimensions_from_config(entry.config, name, known=entry.counted)


def series() -> list[str]:
    """Return what the models are called together (Qwen2.5, Llama 3, ...), in the order of the file."""
    return list(dict.fromkeys(entry.series for entry in entries().values()))


def smaller_than(dims: ModelDimensions) -> list[tuple[str, ModelDimensions]]:
    """Return the models with fewer parameters and their sizes, the largest first, but those of the same series before.

    Sizes that are not in the catalogue belong to the series of all models of their type.
    """
    known = catalogue()
    akin = [name for name, other in known.items() if _alike(dims, other)]
    akin = akin or [name for name, other in known.items() if other.model_type == dims.model_type]
    same = {entries()[name].series for name in akin}
    smaller = [(name, other) for name, other in known.items() if other.num_parameters < dims.num_parameters]
    return sorted(smaller, key=lambda item: (entries()[item[0]].series not in same, -item[1].num_parameters))


def _alike(one: ModelDimensions, other: ModelDimensions) -> bool:
    """Whether two models differ in nothing but the length of their sequences and how they are stored."""
    ignored: dict[str, Any] = {"max_positions": None, "torch_dtype": None, "sliding_window": None, "sliding_layers": 0}
    return replace(one, **ignored) == replace(other, **ignored)
