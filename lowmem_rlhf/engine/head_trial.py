"""Which output head a model has: what its config says of its logits is tried out on its own forward.

The decoder is left out: the model's forward gets hidden states that are made up, and a small fp32 layer in place of
its output matrix. So scales and caps are seen exactly, whatever dtype the model is in, and the whole matrix has to be
looked at only once, for a few rows.

Shapes: T positions, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers.modeling_outputs import BaseModelOutputWithPast

from lowmem_rlhf.engine.logprobs import Head, possible_heads
from lowmem_rlhf.engine.trial import ROUNDINGS
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.memory import is_out_of_memory

ENTRIES = 48  # of the vocabulary of the small layer
CLOSE = 1e-5  # of the largest logit, in fp32


class _States(BaseModelOutputWithPast):
    """A decoder's output of hidden states alone; whatever else a model asks it for is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@torch.no_grad()
def tried_head(model: Any, decoder: nn.Module, model_id: str) -> Head:
    """Return the head that computes what the model itself computes from its last hidden states.

    Raises:
        UserError: the model does more on the way to its logits than a `Head`.
    """
    fitting = [head for head in possible_heads(model) if _same_form(model, decoder, head)]
    if not fitting or not _same_numbers(model, decoder, fitting[0]):
        raise UserError(
            f"model {model_id!r} ({type(model).__name__}) computes more on the way to its logits than its output head "
            "and cannot be trained; take another model"
        )
    return fitting[0]


def _same_form(model: Any, decoder: nn.Module, head: Head) -> bool:
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = head.module.in_features
    device = next(head.module.parameters()).device
    # without its usual start, which would draw from the global generator
    small = skip_init(nn.Linear, width, ENTRIES, bias=False, dtype=torch.float32, device=device)
    states = torch.randn((4, width), generator=generator, dtype=torch.float32, device="cpu")  # type: ignore[arg-type]
    states = (states * torch.tensor([[0.1], [1.0], [5.0], [30.0]], dtype=torch.float32, device="cpu")).to(device)
    small.weight.copy_(torch.randn(small.weight.shape, generator=generator, dtype=torch.float32, device="cpu"))
    small.weight.mul_(width**-0.5)  # type: ignore[operator]
    with _in_place_of(model, head.module, small):
        want = _logits(model, decoder, states)
    if want is None:
        return False
    got = Head(small, head.scale, head.softcap).logits(states)
    return got.shape == want.shape and bool(((got - want).abs() <= CLOSE * want.abs().amax(-1, keepdim=True)).all())


def _same_numbers(model: Any, decoder: nn.Module, head: Head) -> bool:
    """Say whether the real matrix gives the model's logits, each element to the rounding of a sum in its dtype."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    dtype = model.get_input_embeddings().weight.dtype
    states = torch.randn((2, head.module.in_features), generator=generator, dtype=torch.float32, device="cpu")  # type: ignore[arg-type]
    states = states.to(device=next(head.module.parameters()).device, dtype=dtype)
    want = _logits(model, decoder, states)
    got = head.logits(states).float()
    if want is None or got.shape != want.shape:
        return False
    want = want.float()
    allowed = ROUNDINGS * torch.finfo(dtype).eps * (want.abs() + want.square().mean(-1, keepdim=True).sqrt())
    return bool(((got - want).abs() <= allowed + CLOSE * want.abs().amax(-1, keepdim=True)).all())


def _logits(model: Any, decoder: nn.Module, states: torch.Tensor) -> torch.Tensor | None:
    """Return the logits (T, V) that a model's own forward makes of last hidden states (T, H); None where it does not.

    Whatever error foreign code raises here says that it does something else with its decoder.
    """
    ids = torch.zeros((1, states.shape[0]), dtype=torch.long, device=states.device)
    before = vars(decoder).get("forward")
    decoder.forward = lambda *args, **kwargs: _States(last_hidden_state=states[None])  # type: ignore[method-assign]
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return None
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before  # type: ignore[method-assign]


@contextmanager
def _in_place_of(model: nn.Module, module: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let another module stand wherever this one does."""
    places = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if child is module
    ]
    try:
        for parent, name in places:
            parent._modules[name] = other
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = module
