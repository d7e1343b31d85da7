"""The base as stock transformers and stock peft run it: the same weights, no second copy of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear

from lowmem_rlhf.engine.attention import NAME as ATTENTION
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.fused import unfused
from lowmem_rlhf.engine.lora import SharedLoraLinear
from lowmem_rlhf.engine.wide import unwidened


@contextmanager
def stock_forwards(base: SharedBase) -> Iterator[Any]:
    """Yield the base's model with the stock forwards, the stock attention and peft's adapter layers, in this role."""
    model = base.model
    packs = model.config._attn_implementation == ATTENTION
    layers = list(base.adapter_layers())
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    if packs:
        model.set_attn_implementation(base.stock_attention)
    try:
        for layer in layers:
            layer.forward = partial(_by_peft, layer)  # type: ignore[method-assign]
        with unwidened(model), unfused(model):
            yield model
    finally:
        for layer, forward in before:
            del layer.forward
            if forward is not None:
                layer.forward = forward  # type: ignore[method-assign]
        if packs:
            model.set_attn_implementation(ATTENTION)


def _by_peft(layer: SharedLoraLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return a layer's output by peft's own forward; peft has one for every kind of base layer, here the plain one."""
    layer._active_adapter, layer._disable_adapters = list(layer.active.names), not layer.active.names
    return PeftLinear.forward(layer, x, *args, **kwargs)  # type: ignore[arg-type]
