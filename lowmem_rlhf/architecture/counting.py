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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.families.block import Linear
from lowmem_rlhf.architecture.source import cache_folder

FORMAT = 3  # of the cached files; raised when `count_class` counts otherwise
TIMEOUT_S = 180.0

Linears = tuple[tuple[Linear, int], ...]  # kinds of linear layers, and how many there are of each


@dataclass(frozen=True)
class Counted:
    """What a model's class has, over all of its layers.

    Attributes:
        quantized: the linear layers that bitsandbytes quantizes.
        adapted: those that ``all-linear`` adapts.
        block: the adapted ones of one decoder layer, of the one with the most weights in them.
        embedding, head: parameters of the token embedding and of an output head of its own.
        other: parameters that are neither these nor quantized weights: norms, biases, stacked experts, convolutions,
            further embeddings. They keep 16 bits, or 32 as the compute dtype is.
        stacked: those among ``other`` that are experts, in parameters of three dimensions.
        tables: those among ``other`` that are further embeddings, looked up by token.
    """

    quantized: Linears
    adapted: Linears
    block: tuple[Linear, ...]
    embedding: int
    head: int
    other: int
    stacked: int
    tables: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, for the catalogue."""
        kinds = {name: [[*astuple(x), many] for x, many in getattr(self, name)] for name in ("quantized", "adapted")}
        numbers = {name: getattr(self, name) for name in ("embedding", "head", "other", "stacked", "tables")}
        return {**kinds, "block": [list(astuple(x)) for x in self.block], **numbers}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Counted":
        """Return what `to_json` wrote."""
        kinds = {name: tuple((Linear(*one[:-1]), one[-1]) for one in values[name]) for name in ("quantized", "adapted")}
        return cls(**{**values, **kinds, "block": tuple(Linear(*one) for one in values["block"])})

    @property
    def total(self) -> int:
        """All parameters, a tied matrix once."""
        return weights_of(self.quantized) + self.embedding + self.head + self.other


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
    adapted: Counter[Linear] = Counter()
    layers: dict[str, list[Linear]] = {}
    for name, inputs, outputs, bias, is_quantized, is_adapted in measured["linears"]:
        linear = Linear(name.rsplit(".", 1)[-1], inputs, outputs, bias)
        quantized[linear] += is_quantized
        adapted[linear] += is_adapted
        if is_adapted:
            layers.setdefault(layer_of(name), []).append(linear)
    inside = [linears for layer, linears in layers.items() if layer] or list(layers.values())
    block = max(inside, key=lambda linears: sum(x.inputs * x.outputs for x in linears), default=[])
    converted = tuple((linear, many) for linear, many in quantized.items() if many)
    return Counted(
        quantized=converted,
        adapted=tuple((linear, many) for linear, many in adapted.items() if many),
        block=tuple(block),
        embedding=measured["embedding"],
        head=measured["head"],
        other=measured["total"] - weights_of(converted) - measured["embedding"] - measured["head"],
        stacked=measured["stacked"],
        tables=measured["tables"],
    )
