"""Norms with weights as real models have them: every element as the stock module's, to rounding."""

import copy
import importlib

import pytest
import torch

from lowmem_rlhf.engine.fused import fuse
from lowmem_rlhf.engine.trial import norm_weights, trial_rows

H = 96
# class -> whether it adds one to its weight
NORMS = {
    "llama.LlamaRMSNorm": False,
    "qwen2.Qwen2RMSNorm": False,
    "qwen3.Qwen3RMSNorm": False,
    "mistral.MistralRMSNorm": False,
    "olmo2.Olmo2RMSNorm": False,
    "olmo3.Olmo3RMSNorm": False,
    "gemma.GemmaRMSNorm": True,
    "gemma2.Gemma2RMSNorm": True,
    "gemma3.Gemma3RMSNorm": True,
    "gemma3n.Gemma3nRMSNorm": False,
    "gemma4.Gemma4RMSNorm": False,
    "vaultgemma.VaultGemmaRMSNorm": True,
    "qwen3_next.Qwen3NextRMSNorm": True,
    "qwen3_5.Qwen3_5RMSNorm": True,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm_of(name, weight, dtype):
    folder, kind = name.split(".")
    cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), kind)
    norm = cls(H, eps=1e-6).to(dtype).requires_grad_(False)
    norm.weight.copy_(weight)
    return norm


def exact(norm, adds_one, x):
    wide = x.double()
    scale = norm.weight.double() + adds_one
    return wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_each_element_is_the_stock_norms_to_rounding(name, dtype):
    limits = torch.finfo(dtype)
    for weight in norm_weights(H):
        stock = norm_of(name, weight, dtype)
        ours = copy.deepcopy(stock)
        assert fuse(ours, dtype) == 1
        for x in trial_rows(H, dtype):
            want = exact(stock, NORMS[name], x)
            off = (ours(x).double() - want).abs()
            assert bool((off <= 2 * limits.eps * want.abs() + limits.smallest_normal).all())
            assert float((ours(x) == stock(x)).double().mean()) > (0.99 if dtype != torch.float32 else 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_the_stock_norms(name, dtype):
    eps = torch.finfo(dtype).eps
    for weight in norm_weights(H):
        stock = norm_of(name, weight, dtype)
        ours = copy.deepcopy(stock)
        fuse(ours, dtype)
        generator = torch.Generator().manual_seed(3)
        x, outer = (torch.randn((5, H), generator=generator) for _ in range(2))
        x, outer = x.to(dtype), outer.to(dtype)
        found = []
        for module in (ours, stock):
            given = x.clone().requires_grad_()
            module(given).backward(outer)
            found.append(given.grad.double())
        scale = found[1].abs().amax(-1, keepdim=True)
        assert bool(((found[0] - found[1]).abs() <= 4 * eps * scale).all())


class Shifted(torch.nn.Module):
    """A norm of the known name with another form; at zero weights it is one of the known ones."""

    def __init__(self, form):
        super().__init__()
        self.weight, self.eps, self.form = torch.nn.Parameter(torch.zeros(H)), 1e-6, form

    def forward(self, x):
        normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return (normed * self.form(self.weight.float())).to(x.dtype)


class ShiftedRMSNorm(Shifted):
    pass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "form",
    [
        lambda w: 1 - w,
        lambda w: 1 + 1.01 * w,
        lambda w: 1 + w.abs(),
        lambda w: w.exp(),
        lambda w: 1 + w.roll(1),
    ],
)
def test_a_norm_of_another_form_stays_whatever_its_weights_are(form, dtype):
    for weight in (torch.zeros(H), torch.full((H,), 1.0), *norm_weights(H)):
        norm = ShiftedRMSNorm(form).to(dtype).requires_grad_(False)
        norm.weight.copy_(weight)
        assert fuse(norm, dtype) == 0
