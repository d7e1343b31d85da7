"""The packed pass with shared prompts against the stock transformers model with stock peft, one sequence at a time."""

import copy

import pytest
import torch
from peft import PeftModel
from tiny_models import CPU, FAMILIES, RECURRENT, as_batch, ragged_groups, tiny_base

from lowmem_rlhf.engine.packing import pack, split_groups
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs, packed_logprobs
from lowmem_rlhf.engine.roles import POLICY

TEMPERATURE = 0.7
TILE = 5
CLOSE = 1e-5


def distance(a, b):
    """Return |a - b| / |b| of two tensors or two dicts of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = (torch.cat([x[name].flatten() for name in sorted(x)]) for x in (a, b))
    return float((a - b).norm() / b.norm())


def weights_of(groups):
    """Return one weight for each scored token, by row, of both signs."""
    generator = torch.Generator().manual_seed(5)
    return {
        row: torch.randn(len(completion), generator=generator)
        for group in groups
        for row, completion in zip(group.rows, group.completions, strict=True)
    }


def gradients(module):
    """Return the adapter's gradients, whatever peft calls the adapter."""
    return {
        name.replace(f".{POLICY}.", ".").replace(".default.", "."): p.grad.clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def padded_pass(stock, groups):
    """Return log-probs by row of the stock model, each sequence alone: no packing, no sharing, all logits at once."""
    logps = {}
    for group in groups:
        for row, completion in zip(group.rows, group.completions, strict=True):
            ids = torch.tensor([[*group.prompt, *completion]])
            logits = stock(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1].float() / TEMPERATURE
            logps[row] = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
    return logps


def stock_with_peft(base, stock, groups, weights, folder):
    """Return the stock model with the base's adapter in stock peft, its log-probs by row, those without the adapter,
    and the gradients of the weighted sum."""
    base.save_adapter(folder)
    stock = PeftModel.from_pretrained(stock, folder, is_trainable=True)
    logps = padded_pass(stock, groups)
    torch.cat([logps[row] * weights[row] for row in logps]).sum().backward()
    logps = {row: values.detach() for row, values in logps.items()}
    with stock.disable_adapter(), torch.no_grad():
        untouched = padded_pass(stock, groups)
    assert distance(torch.cat(list(untouched.values())), torch.cat(list(logps.values()))) > 0.01, "the adapter matters"
    return stock, logps, untouched, gradients(stock)


def packed_pass(base, groups, max_tokens, weights=None):
    """Return log-probs by row of the packed pass in micro-batches; with weights, their weighted sum's gradients too."""
    logps = {}
    with base.role(POLICY):
        for part in split_groups(groups, max_tokens):
            packed = pack(part, CPU)
            values, _ = packed_logprobs(base, packed, TEMPERATURE, TILE)
            if weights is not None:
                (values * torch.cat([weights[row] for row in packed.rows])).sum().backward()
            logps.update(zip(packed.rows, values.detach().split(packed.lengths), strict=True))
    return logps


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_packed_equals_stock_transformers_with_stock_peft(family, tmp_path):
    base, stock = tiny_base(family)
    assert base.packable and not base.note
    groups = ragged_groups()
    weights = weights_of(groups)
    _, want, untouched, want_gradients = stock_with_peft(base, stock, groups, weights, tmp_path)

    for checkpointing in (False, True):
        base.set_gradient_checkpointing(checkpointing)
        base.zero_grad()
        got = packed_pass(base, groups, 1000, weights)
        assert sorted(got) == sorted(want)
        assert max(distance(got[row], want[row]) for row in want) < CLOSE
        assert distance(gradients(base.peft), want_gradients) < CLOSE

    for max_tokens in (1, 17, 30):
        base.zero_grad()
        packed_pass(base, groups, max_tokens, weights)
        assert distance(gradients(base.peft), want_gradients) < CLOSE

    with base.role("reference"), torch.no_grad():
        packed = pack(groups, CPU)
        values, _ = packed_logprobs(base, packed, TEMPERATURE, TILE)
    for row, own in zip(packed.rows, values.split(packed.lengths), strict=True):
        assert distance(own, untouched[row]) < CLOSE


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen2-window", "phi3"])
def test_the_sliding_window_matters_here(family):
    """Without this the equality above could hold with windows that no sequence reaches."""
    base, _ = tiny_base(family)
    changes = {"sliding_window": 4096}
    wide, _ = tiny_base(family, **changes)
    groups = ragged_groups()
    narrow_logps, wide_logps = packed_pass(base, groups, 1000), packed_pass(wide, groups, 1000)
    assert distance(narrow_logps[2], wide_logps[2]) > 1e-3


def test_score_is_the_packed_pass_whatever_the_micro_batches():
    base, _ = tiny_base("llama")
    groups = ragged_groups(shapes=[(7, [6, 1, 9]), (3, [4, 4, 2]), (7, [1, 1, 1])])
    want = packed_pass(base, groups, 1000)
    with base.role(POLICY):
        for max_tokens, tile in ((1, 1), (20, 3), (1000, 1000)):
            got = completion_logprobs(
                base, as_batch(groups).groups(range(9)), BatchLimits(TEMPERATURE, max_tokens, tile)
            )
            assert not any(values.requires_grad for values in got.values())
            assert max(distance(got[row], want[row]) for row in range(9)) < CLOSE
        some = completion_logprobs(base, as_batch(groups).groups([2, 4]), BatchLimits(TEMPERATURE, 1000, 8))
    assert sorted(some) == [2, 4]
    assert distance(some[4], want[4]) < CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_equals_stock_in_16_bit_to_rounding(dtype, tmp_path):
    base, stock = tiny_base("qwen3", dtype=dtype)
    base.save_adapter(tmp_path)
    stock = PeftModel.from_pretrained(stock, tmp_path)
    groups = ragged_groups()
    with torch.no_grad():
        want = torch.cat(list(padded_pass(stock, groups).values()))
    got = packed_pass(base, groups, 1000)
    got = torch.cat([got[row] for row in sorted(got)])
    assert got.dtype == torch.float32
    assert distance(got, want) < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_a_completion_does_not_see_its_siblings():
    base, _ = tiny_base("llama")
    groups = ragged_groups(shapes=[(7, [6, 5, 9]), (4, [3, 3, 3])])
    before = packed_pass(base, groups, 1000)
    changed = copy.deepcopy(groups)
    changed[0].completions[1][:] = [4, 4, 4, 4, 4]
    after = packed_pass(base, changed, 1000)
    assert distance(after[1], before[1]) > 1e-3
    for row in (0, 2, 3, 4, 5):
        assert distance(after[row], before[row]) < CLOSE
