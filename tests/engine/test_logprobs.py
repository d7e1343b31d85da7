"""Tiled log-probs against the full computation."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_rlhf.engine.logprobs import Head, tiled_logprobs

T, H, V = 13, 16, 61


def linear(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(H, V, bias=bias, dtype=dtype).requires_grad_(False)


def inputs(length=T, width=H, vocabulary=V, dtype=torch.float32):
    torch.manual_seed(1)
    hidden = (2 * torch.randn(length, width)).to(dtype).requires_grad_()
    return hidden, torch.randint(vocabulary, (length,)), torch.randn(length), torch.randn(length)


def full(hidden, targets, weight, bias, scale, softcap, temperature):
    """Return log-probs and entropies from all logits at once, in fp64."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def check(head, weight, bias, temperature, tile, close):
    hidden, targets, w_logp, w_entropy = inputs(width=weight.shape[1], vocabulary=weight.shape[0])
    want = full(hidden, targets, weight, bias, head.scale, head.softcap, temperature)
    got = tiled_logprobs(hidden, targets, head, temperature, tile, "gradient")
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=close, atol=close)
    for a, b in ((1.0, 0.0), (0.0, 1.0), (0.7, -0.3)):
        expected = torch.autograd.grad(
            (a * want[0] * w_logp + b * want[1] * w_entropy).sum(), hidden, retain_graph=True
        )[0]
        value = torch.autograd.grad((a * got[0] * w_logp + b * got[1] * w_entropy).sum(), hidden, retain_graph=True)[0]
        assert float((value - expected).norm() / expected.norm()) < close


@pytest.mark.parametrize("tile", [1, 4, T, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 3.0), (2.0, 1.5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [7, V])
def test_tiled_equals_full(tile, temperature, scale, softcap, bias, chunk, monkeypatch):
    monkeypatch.setattr("lowmem_rlhf.planning.limits.VOCABULARY_CHUNK", chunk)
    module = linear(bias)
    check(Head(module, scale, softcap), module.weight, module.bias, temperature, tile, 5e-6)


def test_large_logits_neither_overflow_nor_lose_the_gradient():
    module = linear()
    with torch.no_grad():
        module.weight.mul_(200)
    check(Head(module), module.weight, None, 1.0, 5, 1e-3)  # fp32 logits of several hundred


def test_16_bit_log_probs_are_exact_sums_over_the_16_bit_logits():
    """Only the head's product is 16-bit; exponentials and sums are fp32."""
    module = linear(dtype=torch.bfloat16)
    hidden, targets, _, _ = inputs(dtype=torch.bfloat16)
    logits = module(hidden).detach().double()
    for temperature in (1.0, 0.6):
        logps, entropies = tiled_logprobs(hidden, targets, Head(module), temperature, 5)
        logp = (logits / temperature).log_softmax(-1)
        torch.testing.assert_close(logps.double(), logp.gather(-1, targets[:, None]).squeeze(-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropies.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)
    hidden_grad = torch.autograd.grad(logps.sum(), hidden)[0]
    assert hidden_grad.dtype == torch.bfloat16


def quantized(load_tiny, quantization):
    """Return a quantized linear layer that stands for a quantized head, and its dequantized weight (V, H)."""
    layer = load_tiny(quantization, "float32").model.model.layers[0].mlp.gate_proj.base_layer
    if quantization == "nf4":
        return layer, bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    state = layer.state if layer.state.CB is not None else layer.weight
    return layer, state.CB.float() * state.SCB[:, None].float() / 127


def test_nf4_head_equals_its_dequantized_weight(load_tiny):
    layer, weight = quantized(load_tiny, "nf4")
    check(Head(layer), weight, None, 0.8, 4, 5e-5)


def test_int8_head_takes_the_gradient_of_its_dequantized_weight(load_tiny):
    """LLM.int8 rounds its input too, so the logits are its own; the way back is the dequantized weight."""
    layer, _ = quantized(load_tiny, "int8")
    hidden, targets, w_logp, _ = inputs(width=64, vocabulary=128)
    layer(hidden)  # the first call moves the weight into the layer's state
    logits = layer(hidden).detach().float()
    weight = (layer.state.CB if layer.state.CB is not None else layer.weight.CB).float()
    weight = weight * (layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB)[:, None].float() / 127
    got = tiled_logprobs(hidden, targets, Head(layer), 1.0, 1000)[0]
    torch.testing.assert_close(got, logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1))
    d_logits = (nn.functional.one_hot(targets, 128) - logits.softmax(-1)) * w_logp[:, None]
    want = d_logits @ weight
    value = torch.autograd.grad((got * w_logp).sum(), hidden)[0]
    assert float((value - want).norm() / want.norm()) < 1e-3


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest result of any operation."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.largest = max([self.largest, *sizes])
        return out


def test_entropy_is_left_out_or_has_no_gradient_unless_asked_for():
    module = linear()
    hidden, targets, _, _ = inputs()
    want, entropies = tiled_logprobs(hidden, targets, Head(module), 1.0, 4, "gradient")
    for kind in ("none", "value"):
        logps, got = tiled_logprobs(hidden, targets, Head(module), 1.0, 4, kind)
        torch.testing.assert_close(got, entropies if kind == "value" else torch.zeros_like(got))
        assert logps.requires_grad and not got.requires_grad
        for a, b in zip(*(torch.autograd.grad(x.sum(), hidden, retain_graph=True) for x in (logps, want)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [50, 700])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_nothing_of_size_tokens_by_vocabulary_exists(softcap, chunk, monkeypatch):
    monkeypatch.setattr("lowmem_rlhf.planning.limits.VOCABULARY_CHUNK", chunk)
    length, width, vocabulary, tile = 96, 4, 700, 8
    module = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden, targets, _, _ = inputs(length, width, vocabulary)
    with LargestTensor() as seen:
        logps, entropies = tiled_logprobs(hidden, targets, Head(module, 1.0, softcap), 0.9, tile, "gradient")
        (logps.sum() + entropies.sum()).backward()
    assert 0.8 * tile * vocabulary <= seen.largest <= tile * vocabulary + vocabulary
    with LargestTensor() as seen:
        module(hidden).log_softmax(-1)
    assert seen.largest == length * vocabulary  # the measurement sees it where it exists
