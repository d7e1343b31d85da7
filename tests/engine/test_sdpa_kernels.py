"""No attention call falls to SDPA's math kernel: each suits the others, and a card is forbidden to take it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import fill_adapter, ragged_groups, tiny_model, tiny_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lowmem_rlhf.architecture.catalogue import catalogue
from lowmem_rlhf.engine import attention
from lowmem_rlhf.engine.attention import why_math
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.packing import pack
from lowmem_rlhf.engine.passes import packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.rollout.continuous import ContinuousEngine
from lowmem_rlhf.rollout.sampling import Sampling

ATTENDING = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gemma4", "phi3", "gpt2", "lfm2", "qwen3_5"]
ATTENDING += ["granite_hybrid"]
NO_MATH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


class Calls(TorchFunctionMode):
    """Notes for each call of SDPA why it would fall to the math kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.whys: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            assert not (kwargs or {}).get("enable_gqa")
            self.whys.append(why_math(*args[:3], (kwargs or {}).get("attn_mask")))
        return func(*args, **(kwargs or {}))


def passes(family: str, device: str, dtype: torch.dtype) -> None:
    """Run a packed pass with its gradient, and a rollout."""
    sizes = {"gpt2": {"n_embd": 64}, "granite_hybrid": {"num_attention_heads": 6}}.get(family, {"hidden_size": 64})
    model = tiny_model(family, **sizes).to(device, dtype)  # heads of a multiple of 8 numbers
    base = SharedBase(model, tiny_tokenizer(), f"tiny/{family}", r=4)
    fill_adapter(base)
    packed = pack(ragged_groups(), base.device)
    with base.role(POLICY):
        packed_logprobs(base, packed, 1.0, 8)[0].sum().backward()
        ContinuousEngine(base).generate([[5, 6, 7], [8, 9]], 2, 6, Sampling(), RolloutLimits(3, 64, 8), seed=0)


@contextmanager
def sdpa_as_on_a_card() -> Iterator[Calls]:
    kept = set(attention.EXPLICIT_ON)
    attention.EXPLICIT_ON.clear()
    try:
        with Calls() as calls:
            yield calls
    finally:
        attention.EXPLICIT_ON |= kept


@pytest.mark.parametrize("family", ATTENDING)
def test_every_call_is_one_that_the_fast_kernels_take(family):
    with sdpa_as_on_a_card() as calls:
        passes(family, "cpu", torch.float32)
    capped = family == "gemma2"  # no kernel has a soft cap: its scores are made a few rows at a time
    assert bool(calls.whys) != capped and set(calls.whys) <= {""}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")
@pytest.mark.parametrize("family", ATTENDING)
def test_a_card_takes_them_with_the_math_kernel_forbidden(family):
    with sdpa_kernel(NO_MATH):
        passes(family, "cuda:0", torch.float16)


def test_heads_of_the_catalogue_are_multiples_of_8():
    assert {name: dims.head_dim for name, dims in catalogue().items() if dims.head_dim % 8} == {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"k": torch.zeros(2, 2, 5, 16), "v": torch.zeros(2, 2, 5, 16)}, "4 query heads meet 2 key heads"),
        ({"q": torch.zeros(2, 4, 16, 5).transpose(2, 3)}, "do not lie side by side"),
        ({"q": torch.zeros(2, 4, 5, 12).half(), "k": torch.zeros(2, 4, 5, 12).half()}, "12 and 16 numbers are no"),
        ({"mask": torch.zeros(5, 8)}, ""),
        ({"mask": torch.zeros(5, 8)[:, :5]}, ""),
        ({"mask": torch.zeros(5, 5)}, "the mask is copied for each call"),
        ({"mask": torch.zeros(5, 8).bool()}, "the mask is torch.bool, queries are torch.float32"),
    ],
)
def test_what_the_kernels_do_not_take_is_told(change, why):
    given = {"q": torch.zeros(2, 4, 5, 16), "k": torch.zeros(2, 4, 5, 16), "v": torch.zeros(2, 4, 5, 16)} | change
    told = SimpleNamespace(**{"mask": None, **given})
    found = why_math(told.q, told.k, told.v, told.mask)
    assert (why in found) if why else found == ""
