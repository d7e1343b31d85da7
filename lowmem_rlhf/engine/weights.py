"""Whether the weights of a loaded model are numbers: none is NaN or infinite, and no layer is all zeros.

The least and the largest value of a tensor tell both, in one pass and without a copy. Quantized layers are looked at
before their quantization, which hides such values: what the quantizer is given is measured on its way.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowmem_rlhf.hardware.memory import is_out_of_memory

SHOWN = 3  # tensors that a message names of each kind


class WeightRanges:
    """Least and largest values of weights, on their own device until they are asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ranges: list[torch.Tensor] = []
        self.ran_out = False  # memory did, while one was measured or quantized

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Measure a weight of any floating dtype."""
        self.names.append(name)
        self.ranges.append(torch.stack(torch.aminmax(weight.detach())).float())

    def broken(self) -> tuple[list[str], list[str]]:
        """Return the names of those with a value that is not finite, and of those that are zeros alone."""
        if not self.ranges:
            return [], []
        values = torch.stack([one.to(self.ranges[0].device) for one in self.ranges]).tolist()
        named = list(zip(self.names, values, strict=True))
        infinite = [name for name, ends in named if not all(map(math.isfinite, ends))]
        return infinite, [name for name, ends in named if ends == [0, 0]]


@contextmanager
def before_quantization() -> Iterator[WeightRanges]:
    """Measure every weight that transformers has bitsandbytes quantize inside the block."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize

    ranges = WeightRanges()

    def measured(convert: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            try:
                for name, value in input_dict.items():
                    ranges.add(name, value[0] if isinstance(value, list) else value)
                return convert(self, input_dict, *args, **kwargs)
            except RuntimeError as error:  # transformers goes on, and names the tensor alone
                ranges.ran_out = ranges.ran_out or is_out_of_memory(error)
                raise

        return wrapper

    with ExitStack() as stack:
        for operation in (Bnb4bitQuantize, Bnb8bitQuantize):
            stack.enter_context(patch.object(operation, "convert", measured(operation.convert)))
        yield ranges


@torch.no_grad()
def broken_weights(model: nn.Module, quantized: WeightRanges | None = None) -> str:
    """Return in words which weights are no numbers, and which layers all zeros; empty: all are what they should be.

    Args:
        quantized: the weights that `before_quantization` saw, where the model was loaded in its block.
    """
    ranges = WeightRanges()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
            ranges.add(name, parameter)
        if torch.is_tensor(scales := getattr(parameter, "SCB", None)):  # int8's, which are made in float16
            ranges.add(name, scales)
    layers = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | Conv1D)}
    (infinite, zero), (lost, empty) = ranges.broken(), (quantized or WeightRanges()).broken()
    infinite, zero = sorted({*infinite, *lost}), sorted({*(name for name in zero if name in layers), *empty})
    parts = [
        f"values that are not finite in {few(infinite)}" if infinite else "",
        f"nothing but zeros in {few(zero)}" if zero else "",
    ]
    return " and ".join(part for part in parts if part)


def few(names: Collection[str]) -> str:
    """Return how many tensors there are, and the first of them by name."""
    shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"
