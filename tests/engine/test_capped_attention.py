"""Attention with a soft cap in parts of a few rows: the numbers and gradients of the whole."""

import pytest
import torch

from lowmem_rlhf.engine import attention


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 4, 6, 8), (5, 2, 9, 8), (5, 2, 9, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    mask = torch.zeros(6, 9, dtype=dtype).masked_fill_(~attention.causal_mask(6, 9, None, q.device), float("-inf"))
    return [x.requires_grad_() for x in (q, k, v)], mask


@pytest.mark.parametrize("at_once", [1, 2 * 4 * 6 * 9, 1 << 22])
def test_parts_are_the_whole(at_once, monkeypatch):
    monkeypatch.setattr(attention, "CAPPED_SCORES", at_once)
    given, mask = inputs(torch.float32)
    outer = torch.randn(5, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    got = attention._Capped.apply(*given, 0.3, mask, 2.0)
    want = attention._explicit(*given, 0.3, mask, 2.0)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(got, given, outer), torch.autograd.grad(want, given, outer), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_scores_are_not_kept_for_the_backward_pass():
    given, mask = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        attention._Capped.apply(*given, 0.3, mask, 2.0)
    assert sorted(kept) == sorted([*(x.shape for x in given), mask.shape])
