"""The padded path: as the packed one where both are possible, and as stock transformers where only it is."""

import pytest
import torch
from test_packed_equals_padded import (
    CLOSE,
    TEMPERATURE,
    TILE,
    distance,
    gradients,
    padded_pass,
    stock_with_peft,
    weights_of,
)
from tiny_models import (
    COMMON,
    CPU,
    EOS,
    RECURRENT,
    UNPACKABLE,
    VOCAB,
    as_batch,
    ragged_groups,
    tiny_base,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_rlhf.engine import base as base_module
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.padded import pad, split_padded
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs, packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.own_cache import own_cache_waves
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.rollout.sampling import Sampling

pytestmark = pytest.mark.long

LIMITS = RolloutLimits(rows=64, prefill_tokens=24, tile=5)


def logprobs(base, groups, max_tokens, weights=None):
    """Return log-probs by row in micro-batches of the base's layout; with weights, add their sum's gradients."""
    logps = {}
    with base.role(POLICY):
        for part in base.layout.split(groups, max_tokens):
            batch = base.layout.lay_out(part, CPU)
            values, _ = packed_logprobs(base, batch, TEMPERATURE, TILE)
            if weights is not None:
                (values * torch.cat([weights[row] for row in batch.rows])).sum().backward()
            logps.update(zip(batch.rows, values.detach().split(batch.lengths), strict=True))
    return logps


def check(base, groups, weights, want, want_gradients):
    for checkpointing in (False, True):
        base.set_gradient_checkpointing(checkpointing)
        for max_tokens in (1, 40, 1000):
            base.zero_grad()
            got = logprobs(base, groups, max_tokens, weights)
            assert sorted(got) == sorted(want)
            assert max(distance(got[row], want[row]) for row in want) < CLOSE
            assert distance(gradients(base.peft), want_gradients) < CLOSE


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", *RECURRENT])
def test_padded_equals_packed(family, monkeypatch):
    packed, _ = tiny_base(family)
    assert packed.packable
    monkeypatch.setattr(base_module, "why_not_packed", lambda model: "the test says so")
    padded, _ = tiny_base(family)
    assert not padded.packable
    assert padded.model.config._attn_implementation == "eager"
    groups = ragged_groups()
    weights = weights_of(groups)
    want = logprobs(packed, groups, 1000, weights)
    check(padded, groups, weights, want, gradients(packed.peft))


@pytest.mark.parametrize("family", UNPACKABLE)
def test_padded_equals_stock_transformers_with_stock_peft(family, tmp_path):
    base, stock = tiny_base(family)
    assert not base.packable
    groups = ragged_groups()
    weights = weights_of(groups)
    stock, want, _, want_gradients = stock_with_peft(base, stock, groups, weights, tmp_path)
    check(base, groups, weights, want, want_gradients)
    with base.role("reference"):
        passes = BatchLimits(TEMPERATURE, 60, TILE)
        some = ragged_groups(shapes=[(7, [6, 1, 9]), (3, [4, 4, 2])])
        assert (
            max(
                distance(*pair)
                for pair in _pairs(completion_logprobs(base, as_batch(some).groups(range(6)), passes), stock, some)
            )
            < CLOSE
        )


def _pairs(got, stock, groups):
    with stock.disable_adapter(), torch.no_grad():
        want = padded_pass(stock, groups)
    return [(got[row], want[row]) for row in want]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*UNPACKABLE, *RECURRENT])
def test_sampling_log_probs_are_those_of_the_training_pass(family, checkpointing):
    base, _ = tiny_base(family)
    base.model.generation_config.eos_token_id = [EOS, 20, 21, 22]
    base.set_gradient_checkpointing(checkpointing)
    prompts = ragged_prompts()
    with base.role(POLICY):
        rollout = wave_engine(base).generate(prompts, 4, 30, Sampling(1.6), LIMITS, seed=3)
        flat = [c for group in rollout for c in group]
        scored = completion_logprobs(
            base, Rollout(prompts, flat, 4).groups(range(len(flat))), BatchLimits(1.6, 200, 16)
        )
    assert len({len(c.ids) for c in flat}) > 4
    for row, completion in enumerate(flat):
        torch.testing.assert_close(torch.tensor(completion.logps), scored[row], rtol=1e-4, atol=1e-4)
    if checkpointing:
        layers = [m for m in base.model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert layers  # on again after the rollout


def ragged_prompts(lengths=(7, 3, 1, 12, 7)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", ["gpt_oss", "mamba", *RECURRENT])
def test_the_same_seed_gives_the_same_completions_however_they_are_batched(family):
    base, _ = tiny_base(family)
    base.model.generation_config.eos_token_id = [EOS, *range(20, 29)]
    prompts = ragged_prompts()
    with base.role(POLICY):
        want = wave_engine(base).generate(prompts, 4, 24, Sampling(0.9), LIMITS, 3)
        for limits in (RolloutLimits(1, 24, 5), RolloutLimits(3, 1, 1), RolloutLimits(7, 1000, 1000)):
            got = wave_engine(base).generate(prompts, 4, 24, Sampling(0.9), limits, 3)
            assert [[(c.ids, c.truncated) for c in g] for g in got] == [[(c.ids, c.truncated) for c in g] for g in want]
        other = wave_engine(base).generate(prompts, 4, 24, Sampling(0.9), LIMITS, 4)
    assert [[c.ids for c in g] for g in other] != [[c.ids for c in g] for g in want]
    assert len({tuple(c.ids) for c in want[0]}) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", *RECURRENT])
def test_a_rollout_is_the_same_on_both_paths(family, monkeypatch):
    results = []
    for reason in ("", "the test says so"):
        monkeypatch.setattr(base_module, "why_not_packed", lambda model, reason=reason: reason)
        base, _ = tiny_base(family)
        with base.role(POLICY):
            results.append(wave_engine(base).generate(ragged_prompts(), 4, 20, Sampling(), LIMITS, 3))
    packed, padded = ([[(c.ids, c.truncated) for c in group] for group in result] for result in results)
    assert packed == padded


@pytest.mark.parametrize("budget", [1, 17, 40, 500])
def test_no_padded_micro_batch_exceeds_the_budget(budget):
    groups = ragged_groups()
    parts = split_padded(groups, budget)
    batches = [pad(part, CPU) for part in parts]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(13))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.rows) == 1
        assert batch.input_ids.shape == batch.position_ids.shape
    if budget == 500:
        assert len(parts) == 1


def test_predicting_positions_and_targets_of_padded_rows():
    batch = pad([Group([5, 6], [[7, 8, 9], [10]], [3, 4]), Group([11], [[12, 13]], [0])], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 6, 6], [11, 12, 12, 12]]
    assert batch.predict.tolist() == [1, 2, 3, 5, 8, 9]
    assert batch.targets.tolist() == [7, 8, 9, 10, 12, 13]
    assert (batch.rows, batch.lengths) == ((3, 4, 0), (3, 1, 2))
    assert batch.row_index.tolist() == [0, 0, 0, 1, 2, 2]


def test_a_wave_holds_no_more_keys_than_were_planned(monkeypatch):
    monkeypatch.setattr(base_module, "why_not_packed", lambda model: "the test says so")
    jobs = [(b, 4 * b + g) for b in range(5) for g in range(4)]
    prompts = ragged_prompts()
    sizes = {}
    for family in ("bloom", "lfm2", "mamba"):
        waves = own_cache_waves(tiny_base(family)[0], prompts, jobs, 6, 4)
        assert sorted(job for wave in waves for job in wave) == jobs
        assert max(map(len, waves)) <= 4
        sizes[family] = len(waves)
    assert sizes["bloom"] > sizes["lfm2"] >= sizes["mamba"] == 5  # all of two layers hold keys, one, none


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "bamba"])
def test_no_mixer_takes_the_kernels_of_training_that_pass_adapters_by(family):
    base, _ = tiny_base(family)
    mixers = [m for m in base.model.modules() if type(m).__name__.endswith("Mixer")]
    assert mixers and not any(m.training for m in mixers)
    assert all(m.training for m in base.adapter_layers())


def test_adapters_beside_weights_that_are_used_directly_are_refused():
    with pytest.raises(UserError, match="does not call its layers dt_proj"):
        SharedBase(tiny_model("mamba"), tiny_tokenizer(), "tiny", target_modules=["in_proj", "dt_proj"])


def test_a_model_that_keeps_state_in_its_modules_runs_whole_texts():
    base, _ = tiny_base("recurrent_gemma")
    assert not base.keeps_cache and "whole text for every token" in base.note
    assert all(tiny_base(family)[0].keeps_cache for family in UNPACKABLE if family != "recurrent_gemma")


@pytest.mark.parametrize(("family", "reason"), [("gpt_oss", "sinks"), ("mamba", "pass state"), ("bloom", "replaced")])
def test_the_reason_is_said(family, reason):
    assert reason in tiny_base(family)[0].why_padded


def test_a_head_that_is_not_all_of_the_way_to_the_logits_is_refused(monkeypatch):
    model = tiny_model("bloom")
    forward = type(model).forward

    def doubled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(UserError, match="more on the way to its logits"):
        SharedBase(model, tiny_tokenizer(), "tiny")


def test_a_window_that_stands_in_a_mask_alone_means_padding():
    """Qwen2-MoE hands its window to nobody: a packed pass would attend beyond it."""
    changes = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5, "num_experts": 4}
    small = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    config = AutoConfig.for_model("qwen2_moe", **COMMON, **changes, **small)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    base = SharedBase(stock, tiny_tokenizer(), "tiny", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    assert not base.packable and "in its mask alone" in base.note
