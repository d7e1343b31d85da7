"""What storing a weight as fewer bits does to it: the step of its codes, and errors of the size that rounding makes.

A number that is rounded to a multiple of a step is off by anything up to half of it, all of that equally likely
(Bennett, Spectra of Quantized Signals, 1948). That says how large the errors of a stored weight may be, without asking
the code that stored it, and, put into a model, what the named quantization explains of a difference in predictions.

Shapes: R rows of C weights, the input features along a row, as blocks of a GGUF are cut.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowmem_rlhf.export.proof.outputs import exact_weight

PIECE = 2**22  # weights at once
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# block kind -> weights in a block, and steps from zero to its largest weight (llama.cpp's ggml-quants.c)
BLOCKS = {"q8_0": (32, 127), "q5_0": (32, 16), "q6_k": (16, 32), "q5_k": (32, 31), "q5_1": (32, 31), "q4_k": (32, 15)}
MIXTURES = {"q4_k_m": ("q4_k", "q5_0"), "q5_k_m": ("q5_k", "q5_1"), "q6_k": ("q6_k", "q8_0")}  # rows of 256, or of 32
_SUBNORMAL = -13  # exponent of float16's smallest normal number, as frexp counts


def stored_kind(kind: str, columns: int, is_embedding: bool) -> str:
    """Return how a GGUF of a kind stores a matrix: a dtype, or a kind of blocks; coarser rather than finer.

    Args:
        kind: a dtype, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m.
        columns: of the matrix; what cannot be cut into blocks is stored wider, as in llama.cpp.
        is_embedding: it is the token embedding or the output head.
    """
    if kind in MIXTURES and columns % 256 == 0:
        return "q6_k" if is_embedding else MIXTURES[kind][0]
    if (kind in MIXTURES or kind == "q8_0") and columns % 32 == 0:
        return MIXTURES[kind][1] if kind in MIXTURES and not is_embedding else "q8_0"
    return {"bf16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}.get(kind, "float16")


def steps(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the step between neighbouring codes for each weight (R, C) when stored as a kind of `stored_kind`."""
    if kind in DTYPES:
        _, exponent = torch.frexp(weight)
        if kind == "float16":
            exponent = exponent.clamp(min=_SUBNORMAL)
        step = torch.ldexp(torch.full_like(weight, torch.finfo(DTYPES[kind]).eps), exponent - 1)
        return step.masked_fill_(weight == 0, 0)
    size, levels = BLOCKS[kind]
    blocks = weight.unflatten(-1, (-1, size))
    if kind in ("q4_k", "q5_k", "q5_1"):  # codes count from a minimum that is never above zero
        width = blocks.amax(-1, keepdim=True).clamp(min=0) - blocks.amin(-1, keepdim=True).clamp(max=0)
    else:
        width = blocks.abs().amax(-1, keepdim=True)
    return (width / levels).expand_as(blocks).flatten(-2)


def as_stored(weight: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Return a weight (R, C), fp32, as it comes back from a kind of `stored_kind`.

    A dtype rounds it. A kind of blocks makes errors as rounding would, drawn evenly within half a step to either side.
    """
    if kind in DTYPES:
        return weight.to(DTYPES[kind]).float()
    drawn = torch.rand(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
    return drawn.sub_(0.5).mul_(steps(weight, kind)).add_(weight)


def furthest_row(stored: torch.Tensor, weight: torch.Tensor, kind: str) -> float:
    """Return the error of the worst row (R, C) in steps of its codes, root mean square: 0.3 for rounding, at most 0.5.

    A search for better codes, as in q4_k, cuts off an outlier now and then; a row of other numbers is off by a step and
    more in every kind (float16: a thousand).
    """
    allowed = steps(weight, kind).norm(dim=-1)
    error = (stored - weight).norm(dim=-1)
    return float((error / allowed.clamp(min=torch.finfo(torch.float32).tiny)).max()) if error.any() else 0.0


class StoredModel:
    """A stock model in fp32 with an adapter of peft, computing as if both were merged and stored as fewer bits.

    Each weight becomes what is stored of its sum with the adapter's product, less that product, so the adapter stays
    where it is. Quantized layers do that anew in every pass. The model is of no use for anything else afterwards.

    Args:
        dtype: in which quantized layers multiply (see `outputs.exact_weight`).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype = model, dtype
        self.kinds: list[str] = []
        self.generator = torch.Generator(device).manual_seed(0)
        self.head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        self.adapters: dict[int, Any] = {
            id(module.base_layer): module for module in model.modules() if isinstance(module, LoraLayer)
        }

    @torch.no_grad()
    def store(self, kind: str) -> None:
        """Store all weights as a kind of numbers, on top of the kinds stored before."""
        self.kinds.append(kind)
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            if ".lora_" in path:
                continue
            if isinstance(module, (Linear4bit, Linear8bitLt)):
                module.forward = partial(self._forward, module)  # type: ignore[method-assign]
                continue
            for weight in module.parameters(recurse=False):
                is_wide = weight.ndim < 2 and kind not in DTYPES  # norms and biases stay fp32 in a GGUF
                if id(weight) not in seen and not is_wide:
                    seen.add(id(weight))
                    weight.data.copy_(self._stored(module, weight.data, kind))

    def _forward(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        weight = exact_weight(layer, self.dtype)
        for kind in self.kinds:
            weight = self._stored(layer, weight, kind)
        return F.linear(x, weight, layer.bias)

    def _stored(self, module: nn.Module, weight: torch.Tensor, kind: str) -> torch.Tensor:
        adapter = self.adapters.get(id(module)) if weight.ndim > 1 else None
        delta = 0.0 if adapter is None else adapter.get_delta_weight(adapter.active_adapters[0]).float()
        total = weight + delta
        rows = total.t() if isinstance(module, Conv1D) else total.view(1, -1) if total.ndim < 2 else total
        how = stored_kind(kind, rows.shape[-1], isinstance(module, nn.Embedding) or module is self.head)
        pieces = rows.split(max(1, PIECE // max(1, rows[0].numel())))
        stored = torch.cat([as_stored(piece, how, self.generator) for piece in pieces])
        return (stored.t() if isinstance(module, Conv1D) else stored.view(weight.shape)) - delta
