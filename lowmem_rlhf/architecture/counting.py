"""The parameters of a model whose type has no terms of its own here: counted once on its real class, then remembered.

The class is built in a process of its own (`count_class`), so planning imports no torch and nothing that a class does
can end it. The result is kept in the cache folder, under the content of the config and the version of transformers.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.families.block import Linear
from lowmem_rlhf.architecture.source import cache_folder
from lowmem_rlhf.recipe.lora_shape import in_any_layer, layer_number

FORMAT = 3  # of the cached files; raised when `count_class` counts otherwise
TIMEOUT_S = 180.0

Linears = tuple[tuple[Linear, int], ...]  # kinds of linear layers, and how many there are of each
Places = tuple[tuple[str, Linear, tuple[int, ...]], ...]  # see `Counted.places`


@dataclass(frozen=True)
class Counted:
    """What a model's class has, over all of its layers.

    Attributes:
        quantized: the linear layers that bitsandbytes quantizes.
        places: those that ``all-linear`` adapts: what their modules are called, with * for the number of the layer, and
            the layers that have one so called (none: it lies outside of layers, under that very name).
        block: the adapted ones of one decoder layer, of the one with the most weights in them.
        embedding, head: parameters of the token embedding and of an output head of its own.
        other: parameters that are neither these nor quantized weights: norms, biases, stacked experts, convolutions,
            further embeddings. They keep 16 bits, or 32 as the compute dtype is.
        stacked: those among ``other`` that are experts, in parameters of three dimensions.
        tables: those among ``other`` that are further embeddings, looked up by token.
    """

    quantized: Linears
    places: Places
    block: tuple[Linear, ...]
    embedding: int
    head: int
    other: int
    stacked: int
    tables: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, for the catalogue."""
        numbers = {name: getattr(self, name) for name in ("embedding", "head", "other", "stacked", "tables")}
        return {
            "quantized": [[*astuple(x), many] for x, many in self.quantized],
            "places": [[name, *astuple(x)[1:], numbers_text(layers)] for name, x, layers in self.places],
            "block": [list(astuple(x)) for x in self.block],
            **numbers,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Counted":
        """Return what `to_json` wrote."""
        kinds = {
            "quantized": tuple((Linear(*one[:-1]), one[-1]) for one in values["quantized"]),
            "places": tuple((one[0], _linear(*one[:-1]), text_numbers(one[-1])) for one in values["places"]),
            "block": tuple(Linear(*one) for one in values["block"]),
        }
        return cls(**{**values, **kinds})

    @property
    def adapted(self) -> Linears:
        """The linear layers that ``all-linear`` adapts, and how many there are of each."""
        found: Counter[Linear] = Counter()
        for _, linear, layers in self.places:
            found[linear] += len(layers) or 1
        return tuple(found.items())

    @property
    def total(self) -> int:
        """All parameters, a tied matrix once."""
        return weights_of(self.quantized) + self.embedding + self.head + self.other


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
    return Linear(name.rsplit(".", 1)[-1], inputs, outputs, bias)


def numbers_text(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ``0-3 5 7-9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return " ".join("-".join(map(str, run)) for run in runs)


def text_numbers(text: str) -> tuple[int, ...]:
    """Return what `numbers_text` wrote."""
    ends = [[int(end) for end in run.split("-")] for run in text.split()]
    return tuple(number for run in ends for number in range(run[0], run[-1] + 1))


def weights_of(linears: Linears) -> int:
    """Return the weights of linear layers, without biases."""
    return sum(linear.inputs * linear.outputs * many for linear, many in linears)


class CannotCount(Exception):
    """The parameters could not be counted; the message says why, in a clause."""


def count(config: Mapping[str, Any]) -> tuple[Counted, dict[str, Any]]:
    """Return the count of a config's model class, and the config's sizes under their common names.

    Raises:
        CannotCount: torch or transformers is not installed, or transformers cannot build a model of this config.
    """
    return _of(json.dumps(config, sort_keys=True))


@cache
def _of(config: str) -> tuple[Counted, dict[str, Any]]:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise CannotCount(f"{package} is not installed")
    version = importlib.metadata.version("transformers")
    key = hashlib.sha256(f"{FORMAT}|{version}|{config}".encode()).hexdigest()[:24]
    path = cache_folder() / "counts" / f"{key}.json"
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        return _counted(measured), measured["fields"]
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
        measured = _ask(config)
    result = _counted(measured), measured["fields"]
    with suppress(OSError):  # without a folder that can be written to it is counted each time
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(measured), encoding="utf-8")
        temporary.replace(path)
    return result


def _ask(config: str) -> dict[str, Any]:
    """Run `count_class` in a process of its own, without network and graphics card."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            [sys.executable, "-m", "lowmem_rlhf.architecture.count_class"],
            input=config,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
            env={**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCount(str(error).rsplit("' ", 1)[-1]) from error
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise CannotCount(last[:300].rstrip("."))
    measured: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return measured


def _counted(measured: Mapping[str, Any]) -> Counted:
    from lowmem_rlhf.architecture.count_class import layer_of

    quantized: Counter[Linear] = Counter()
    places: dict[tuple[str, Linear], list[int]] = {}
    layers: dict[str, list[Linear]] = {}
    for name, inputs, outputs, bias, is_quantized, is_adapted in measured["linears"]:
        linear = Linear(name.rsplit(".", 1)[-1], inputs, outputs, bias)
        quantized[linear] += is_quantized
        if is_adapted:
            layers.setdefault(layer_of(name), []).append(linear)
            number = layer_number(name)
            places.setdefault((in_any_layer(name), linear), []).extend(() if number is None else (number,))
    inside = [linears for layer, linears in layers.items() if layer] or list(layers.values())
    block = max(inside, key=lambda linears: sum(x.inputs * x.outputs for x in linears), default=[])
    converted = tuple((linear, many) for linear, many in quantized.items() if many)
    return Counted(
        quantized=converted,
        places=tuple((name, linear, tuple(numbers)) for (name, linear), numbers in places.items()),
        block=tuple(block),
        embedding=measured["embedding"],
        head=measured["head"],
        other=measured["total"] - weights_of(converted) - measured["embedding"] - measured["head"],
        stacked=measured["stacked"],
        tables=measured["tables"],
    )
