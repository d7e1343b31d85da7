"""The points of scaling.py, and the process with the model that takes a step at each of them."""

import argparse
import gc
import json
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from children import Channel
from work import MODEL, torch_device

PHASES = ("rollout", "score", "update")


@dataclass(frozen=True)
class Point:
    """The work of one step; ``layers`` 0 are all that the model has."""

    generations: int
    completion_length: int
    prompt_length: int
    layers: int = 0
    prompts: int = 1


LABELS = {
    "generations": "completions a prompt",
    "completion_length": "completion tokens",
    "prompt_length": "prompt tokens",
    "layers": "layers",
}
BASE, QUICK_BASE = Point(4, 16, 64), Point(4, 16, 32)
VALUES = {"generations": (2, 4, 8, 16, 32), "completion_length": (8, 16, 32, 64, 128), "prompt_length": (16, 64, 256)}
QUICK_VALUES = {"generations": (2, 4, 8, 16), "completion_length": (8, 16, 32), "prompt_length": (16, 32, 64)}


def series(work: argparse.Namespace, layers: int) -> dict[str, list[Point]]:
    """Return the points of each factor, for a model of so many layers."""
    base = replace(QUICK_BASE if work.quick else BASE, layers=layers)
    values = {**(QUICK_VALUES if work.quick else VALUES), "layers": sorted({-(-layers // 4), -(-layers // 2), layers})}
    return {
        factor: [replace(base, **{factor: value}) for value in values[factor]]
        for factor in ([work.only] if work.only else LABELS)
    }


def bounds(work: argparse.Namespace) -> tuple[int, int]:
    """Return what stays fixed: completions at once, and packed tokens of a pass. Each fits a group of the base."""
    base = QUICK_BASE if work.quick else BASE
    return base.prompts * base.generations, packed_tokens(base)


def packed_tokens(point: Point) -> int:
    """Return the tokens of one group as a pass is fed with them."""
    return point.prompt_length + point.generations * (point.completion_length - 1)


def fills(point: Point, work: argparse.Namespace) -> bool:
    """Whether a point's work is large enough to fill both bounds, so that more of it must not cost more memory."""
    rows, tokens = bounds(work)
    return point.prompts * point.generations >= rows and packed_tokens(point) >= tokens


class Bench:
    """Steps at points: the model is loaded anew whenever the number of layers changes."""

    def __init__(self, work: argparse.Namespace, folder: Path, scratch: Path) -> None:
        from lowmem_rlhf.architecture.lookup import model_dimensions

        self.work, self.folder, self.scratch = work, folder, scratch
        self.dims, self.device = model_dimensions(str(folder)), torch_device(work.device)
        self.layers, self.ours = 0, None  # type: int, Any

    def measure(self, point: Point) -> dict[str, Any]:
        """Return a point's seconds and peak bytes by phase, and the bytes that its sizes account for."""
        from our_step import Cut

        self._load(point.layers)
        rows, tokens = bounds(self.work)
        cut = Cut(rows, tokens, self.work.tile, self.work.checkpointing, self.work.rollout_weights == "dequantized")
        draw = random.Random(0)
        prompts = [
            [draw.randrange(self.dims.vocab_size) for _ in range(point.prompt_length)] for _ in range(point.prompts)
        ]
        given = (prompts, point.generations, point.completion_length, cut)
        counted = self.ours.measure(*given, count=True)
        seconds = self.ours.measure(*given)["seconds"]
        if set(counted["lengths"]) != {point.completion_length}:
            raise SystemExit(f"completions of {point.completion_length} tokens were asked for")
        return {
            "seconds": {**{p: seconds[p] for p in PHASES}, "step": sum(seconds.values())},
            "peak_bytes": {**{p: counted["peaks"][p] for p in PHASES}, "step": max(counted["peaks"].values())},
            "bytes_before": counted["start_bytes"],
            "update_tokens": counted["update_tokens"],
            **self._accounted(point),
        }

    def _load(self, layers: int) -> None:
        """Load the model with so many layers and take a first step, unless it is the one that is loaded."""
        from model_folders import truncated
        from our_step import OurStep

        if layers == self.layers:
            return
        self.ours, self.layers = None, layers
        gc.collect()
        whole = layers == self.dims.num_layers
        folder = self.folder if whole else truncated(self.folder, layers, self.scratch / f"{layers}-layers")
        self.ours = OurStep(str(folder), self.device, self.work.quantization, self.work.compute_dtype)
        self.measure(replace(QUICK_BASE, layers=layers))  # makes the optimizer's state

    def _accounted(self, point: Point) -> dict[str, int]:
        """Return bytes from the model's sizes: the KV cache at its fullest, and one packed row in the update.

        A row has as many tokens as the bound allows, or one prompt with one completion where that is more.
        """
        from work import RANK

        from lowmem_rlhf.hardware.capabilities import capabilities
        from lowmem_rlhf.planning.memory.layers import Layer
        from lowmem_rlhf.planning.memory.resident import dense_bytes, recomputed_layers
        from lowmem_rlhf.planning.memory.rollout import kv_bytes_per_token
        from lowmem_rlhf.planning.shapes import packed_shape

        rows, tokens = bounds(self.work)
        dims, width = replace(self.dims, num_layers=point.layers), 4 if self.work.compute_dtype == "float32" else 2
        at_once = min(point.prompts, -(-rows // point.generations))
        cached = at_once * point.prompt_length + rows * point.completion_length
        length = point.completion_length
        shape = packed_shape(point.prompt_length, length - 1, length, point.generations, point.prompts, tokens)
        dense = dense_bytes(dims, self.work.quantization, width)
        explicit = capabilities(self.device).explicit_scores
        layer = Layer(dims, shape, width, (RANK,) * len(dims.linears), 1, dense, explicit, wide=False)
        again = recomputed_layers(dims, self.work.checkpointing)
        kept = again * layer.hidden + (point.layers - again) * layer.saved()
        return {"kv_bytes": cached * kv_bytes_per_token(dims, width), "row_bytes": kept + layer.backward_peak()}


def serve(work: argparse.Namespace) -> None:
    """Be the process with the model: answer points with figures."""
    from model_folders import model_folder, tiny_llama

    channel = Channel()
    if work.quick:
        import torch

        torch.set_num_threads(1)  # tiny products gain nothing from threads
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        tiny = work.quick and not work.model
        bench = Bench(work, tiny_llama(path / "tiny") if tiny else model_folder(work.model or MODEL), path)
        channel.ready(layers=bench.dims.num_layers)
        while True:
            channel.send(**bench.measure(Point(**json.loads(channel.command()))))
