"""A step on quantized bases of every kind of linear layer: with biases, fused, GPT-2's; with both int8 products."""

import pytest
import torch
from tiny_models import fill_adapter, ragged_groups, save_tiny
from transformers.pytorch_utils import Conv1D

from lowmem_rlhf.engine.attention import PackedContext
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.logprobs import tiled_logprobs
from lowmem_rlhf.engine.packing import pack
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling

pytestmark = pytest.mark.long

FAMILIES = ["llama", "qwen2", "phi", "gpt2"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    changes = {"n_embd": 64, "n_inner": 128} if request.param == "gpt2" else {}
    return save_tiny(request.param, tmp_path_factory.mktemp("model") / request.param, **changes)


def load(folder, quantization: str) -> SharedBase:
    base = SharedBase.load(str(folder), torch.device("cpu"), quantization, "bfloat16", r=4, lora_alpha=8)
    fill_adapter(base, size=0.05)
    return base


def logps_and_gradients(base: SharedBase) -> tuple[torch.Tensor, torch.Tensor]:
    packed = pack(ragged_groups(), base.device)
    with base.role("policy"):
        context = PackedContext(packed.buckets, base.device)
        hidden = base.hidden_states(packed.input_ids, packed.position_ids, context)
        logps, _ = tiled_logprobs(hidden[packed.predict], packed.targets, base.head, 1.0, 16)
        logps.sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in base.trainable().values()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_step_runs_and_equals_that_of_the_same_numbers_in_16_bits(folder, quantization, checkpointing):
    base, exact = load(folder, quantization), load(folder, "none")
    base.set_gradient_checkpointing(checkpointing)
    with torch.no_grad():
        for quantized, layer in zip(base.adapter_layers(), exact.adapter_layers(), strict=True):
            numbers = dense_weight(quantized.base_layer, torch.bfloat16)
            layer.base_layer.weight.copy_(numbers.t() if isinstance(layer.base_layer, Conv1D) else numbers)
    (logps, gradient), (exact_logps, exact_gradient) = logps_and_gradients(base), logps_and_gradients(exact)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert (logps - exact_logps).abs().mean() < 0.05
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.99


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_sampling_runs_on_it(folder, quantization, dequantize):
    base = load(folder, quantization)
    with base.role("policy"), base.decoding(dequantize):
        groups = wave_engine(base).generate([[5, 6, 7], [8, 9]], 3, 5, Sampling(), RolloutLimits(8, 64, 8), seed=0)
    assert [len(group) for group in groups] == [3, 3]


def test_the_kernel_that_int8_takes_on_cuda_can_be_stepped_through(folder, monkeypatch):
    from bitsandbytes.autograd import _functions

    monkeypatch.setattr(_functions, "MatMul8bitFp", _functions.MatMul8bitLt)
    base = load(folder, "int8")
    _, gradient = logps_and_gradients(base)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
