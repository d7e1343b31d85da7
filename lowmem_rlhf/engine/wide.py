"""Gemma in float16: the residual stream and its norms in fp32, products in float16.

Since Gemma 3 the residual stream, and what attention and MLP add to it, exceed 65504, the largest float16. Here the
embeddings begin the stream in fp32. What a norm gives to a product is of order one and is rounded to float16. Other
inputs of products, and the MLP's product of gate and up, are divided by a power of two, token by token, so that neither
they nor the result can overflow; the result is multiplied by it in fp32. Powers of two are exact.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lowmem_rlhf.architecture.families import family_of
from lowmem_rlhf.architecture.families.row import WideStream
from lowmem_rlhf.engine.fused import GATED_MLP
from lowmem_rlhf.engine.lora import SharedLoraLinear
from lowmem_rlhf.engine.mixers import recomputed

LARGEST = 6  # inputs of a product are below two to this: a row of weights sums up to some hundreds


def is_wide(model: Any, dtype: torch.dtype) -> bool:
    """Whether a model needs the arrangement in this compute dtype."""
    return dtype == torch.float16 and family_of(model.config.get_text_config().model_type).wide_stream is not None


def widen(model: Any, dtype: torch.dtype) -> None:
    """Put the arrangement into a model; where a module has a fused forward, that is what it computes."""
    names: WideStream = family_of(model.config.get_text_config().model_type).wide_stream  # type: ignore[assignment]
    embeddings = model.get_input_embeddings()
    embeddings.forward = partial(_embedded, embeddings)  # type: ignore[method-assign]
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if {child for child, _ in module.named_children()} == GATED_MLP:
            module.forward = partial(_gated_mlp, module)
        elif isinstance(module, SharedLoraLinear) or (isinstance(module, nn.Linear) and not last.startswith("lora_")):
            if last != "base_layer" and module is not model.get_output_embeddings():
                module.forward = partial(_product, module.forward, dtype, last in names.results)  # type: ignore[method-assign]
        elif last in names.inputs:
            module.forward = partial(_narrowed, module.forward, dtype)


def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the arrangement, where a model has it, round the inputs of products to another dtype."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func in (_product, _narrowed):
            inner, _, *rest = forward.args
            module.forward = partial(forward.func, inner, dtype, *rest)  # type: ignore[method-assign]


@contextmanager
def unwidened(model: nn.Module) -> Iterator[None]:
    """Let every module have its own forward inside the block."""
    ours = (_embedded, _gated_mlp, _product, _narrowed)
    taken = [(m, f) for m in model.modules() if isinstance(f := vars(m).get("forward"), partial) and f.func in ours]
    try:
        for module, forward in taken:
            if forward.func is _narrowed:
                module.forward = forward.args[0]
            else:
                del module.forward
        yield
    finally:
        for module, forward in taken:
            module.forward = forward  # type: ignore[method-assign]


def _embedded(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings (.., H) in fp32, scaled by the number in the weights' dtype as the stock module has it."""
    rows = F.embedding(ids, module.weight).float()
    scale = getattr(module, "embed_scale", None)
    return rows if scale is None else rows * scale.to(module.weight.dtype).float()


def _narrowed(norm: Callable[..., torch.Tensor], dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return norm(x).to(dtype)


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    """Return for each token (.., 1) the fp32 power of two, at least 1, whose quotient is below ``2 ** LARGEST``."""
    exponent = torch.frexp(x.detach().abs().amax(-1, keepdim=True).float()).exponent
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (exponent - LARGEST).clamp(min=0))


def _product(
    linear: Callable[..., torch.Tensor], dtype: torch.dtype, wide: bool, x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Return a linear layer's output: of an fp32 input, and where ``wide`` of any, in fp32."""
    if x.dtype != torch.float32 and not wide:
        return linear(x, *args, **kwargs)
    scale = _power_of_two(x)
    y = linear((x / scale).to(dtype), *args, **kwargs).float()
    layer: Any = getattr(linear, "__self__", None)
    bias = getattr(getattr(layer, "base_layer", layer), "bias", None)
    return y * scale if bias is None else (y - bias.float()) * scale + bias.float()


def _gated_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    inner, scale = recomputed(partial(_gated, module.act_fn), gate, up)
    down: Any = module.down_proj
    linear = down.forward.args[0] if isinstance(down.forward, partial) else down
    return linear(inner).float() * scale  # type: ignore[no-any-return]


def _gated(activation: Callable[..., torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> Any:
    """Return ``activation(gate) * up`` over its power of two in float16, and that."""
    product = activation(gate.float()) * up.float()
    scale = _power_of_two(product)
    return (product / scale).to(gate.dtype), scale
