"""Gemma in float16 with an fp32 residual stream, on weights with which plain float16 overflows, against fp32."""

import copy

import pytest
import torch
from test_packed_equals_padded import distance, gradients, weights_of
from tiny_models import CPU, fill_adapter, ragged_groups, tiny_model, tiny_tokenizer

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs, packed_logprobs
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.engine.stock import stock_forwards
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.rollout.sampling import Sampling

FAMILIES = ["gemma3", "gemma4"]
LIMITS = BatchLimits(1.0, 64, 8)
SCALE = 1024  # of the loss, as the update has it in float16


def overflowing(family):
    """A stock model in fp32 whose weights are float16's, and whose stream, MLP and products exceed 65504."""
    model = tiny_model(family)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                p.mul_(4.0e4).clamp_(-6.0e4, 6.0e4)
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                p.mul_(90.0)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.mul_(30.0)
            p.copy_(p.half())
    return model


def base_of(model, dtype):
    base = SharedBase(copy.deepcopy(model).to(dtype), tiny_tokenizer(), "tiny", r=4, lora_alpha=8)
    fill_adapter(base, size=0.02)
    return base


def results(base, groups, weights):
    """Return log-probs by row and the adapter's gradients of their weighted sum."""
    found = {}
    with base.role(POLICY):
        for part in base.layout.split(groups, 64):
            batch = base.layout.lay_out(part, CPU)
            values, _ = packed_logprobs(base, batch, 1.0, 8)
            loss = (values * torch.cat([weights[row] for row in batch.rows])).sum()
            (SCALE * loss).backward()
            found.update(zip(batch.rows, values.detach().split(batch.lengths), strict=True))
    return found, {name: gradient / SCALE for name, gradient in gradients(base.peft).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_overflows_float16_is_as_in_fp32(family):
    model = overflowing(family)
    exact, half = base_of(model, torch.float32), base_of(model, torch.float16)
    groups = ragged_groups()
    weights = weights_of(groups)
    batch = half.layout.lay_out(groups[:1], CPU)
    with torch.no_grad(), half.role(REFERENCE), stock_forwards(half) as stock:
        plain = stock(input_ids=batch.input_ids[:, : len(groups[0].prompt)]).logits
    assert not torch.isfinite(plain).all()  # in stock's float16
    (want, wanted), (found, got) = results(exact, groups, weights), results(half, groups, weights)
    off = torch.cat([(found[row] - want[row]).abs() for row in want])
    size = torch.cat([value.abs() for value in want.values()])
    assert off.mean() < 2e-3 * size.mean() and off.max() < 2e-2 * size.max()
    for name, gradient in wanted.items():
        assert torch.isfinite(got[name]).all()
        assert (got[name] - gradient).norm() < 0.2 * gradient.norm() + 1e-7, name
    _, of_bfloat16 = results(base_of(model, torch.bfloat16), groups, weights)
    assert distance(got, wanted) < min(0.1, 0.5 * distance(of_bfloat16, wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probs_are_those_of_the_training_pass(family):
    base = base_of(overflowing(family), torch.float16)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
    with base.role(POLICY):
        rollout = wave_engine(base).generate(prompts, 3, 8, Sampling(), RolloutLimits(8, 64, 8), seed=3)
        flat = [c for group in rollout for c in group]
        scored = completion_logprobs(base, Rollout(prompts, flat, 3).groups(range(len(flat))), LIMITS)
    for row, completion in enumerate(flat):
        torch.testing.assert_close(torch.tensor(completion.logps), scored[row], rtol=2e-2, atol=2e-2)


def test_a_model_that_does_not_overflow_is_the_same_but_for_rounding():
    model = tiny_model("gemma3")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
    exact, half = base_of(model, torch.float32), base_of(model, torch.float16)
    group = [Group([3, 4, 5], [[6, 7, 8, 9]], [0])]
    with exact.role(POLICY), half.role(POLICY):
        want, found = (completion_logprobs(base, group, LIMITS)[0] for base in (exact, half))
        with stock_forwards(half) as stock, torch.no_grad():
            ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
            plain = stock(input_ids=ids).logits[0, 2:-1].float().log_softmax(-1)
    plain = plain.gather(-1, ids[0, 3:, None]).squeeze(-1)
    assert (found - want).abs().max() < 5e-3
    assert (found - want).abs().mean() <= 2 * (plain - want).abs().mean() + 1e-4
