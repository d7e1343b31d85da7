"""Layers that pass a state on: a group costs its prompt once, and the parts that they work in change nothing."""

import pytest
import torch
from test_packed_equals_padded import distance, gradients
from tiny_models import CPU, RECURRENT, tiny_base

from lowmem_rlhf.engine import mixers
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.mixers import CONVOLUTION, DELTA_RULES, SCAN, SCAN_STEP, PackedMixer
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.planning.limits import scan_chunk
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling

PROMPT, GENERATIONS, LENGTH = 7, 8, 5
GROUP = [Group(list(range(4, 4 + PROMPT)), [[20 + g] * LENGTH for g in range(GENERATIONS)], range(GENERATIONS))]
CHUNKED, STEPS = {SCAN, *DELTA_RULES}, {SCAN_STEP, *DELTA_RULES.values()}


def mixers_of(base):
    return [forward for m in base.model.modules() if isinstance(forward := vars(m).get("forward"), PackedMixer)]


@pytest.fixture
def tokens(monkeypatch):
    """Count the tokens that reach the stock recurrences of a base's layers, by function."""

    def count(base):
        found: dict[str, int] = {}
        for place in {id(one._globals): one._globals for one in mixers_of(base)}.values():
            for name in (CHUNKED | STEPS) & place.keys():

                def counted(*args, stock=place[name], name=name, **kwargs):
                    x = args[1] if name == SCAN_STEP else args[0]
                    found[name] = found.get(name, 0) + (x.shape[0] if name == SCAN_STEP else x.shape[0] * x.shape[1])
                    return stock(*args, **kwargs)

                monkeypatch.setitem(place, name, counted)
        return found

    return count


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "granite_hybrid"])
def test_a_group_costs_its_prompt_once(family, tokens, monkeypatch):
    base, _ = tiny_base(family)
    layers = len(mixers_of(base))
    found = tokens(base)
    with torch.no_grad(), base.role(POLICY):
        base.states(base.layout.lay_out(GROUP, CPU))
    assert sum(found.values()) == layers * (PROMPT + GENERATIONS * (LENGTH - 1)) and set(found) <= CHUNKED
    found.clear()
    monkeypatch.setattr(type(base), "stop_ids", frozenset())
    with base.role(POLICY):
        limits = RolloutLimits(rows=64, prefill_tokens=64, tile=8)
        wave_engine(base).generate([GROUP[0].prompt], GENERATIONS, LENGTH, Sampling(), limits, seed=0)
    assert sum(found[name] for name in found.keys() & CHUNKED) == layers * PROMPT
    assert sum(found[name] for name in found.keys() & STEPS) == layers * GENERATIONS * (LENGTH - 1)


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5", "granite_hybrid", "falcon_h1"])
def test_parts_along_the_rows_and_along_a_row_change_nothing(family, monkeypatch):
    base, _ = tiny_base(family, max_position_embeddings=512)
    ids = torch.randint(4, 90, (330,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [Group(ids[:150], [ids[150:160], ids[160:290]], [0, 1]), Group(ids[:3], [ids[300:330]], [2])]

    def passed(at_once):
        monkeypatch.setattr(mixers, "MIXED_TOKENS", at_once)
        base.zero_grad()
        with base.role(POLICY):
            values, _ = packed_logprobs(base, base.layout.lay_out(groups, CPU), 1.0, 64)
            values.square().sum().backward()
        return values.detach(), gradients(base.peft)

    (want, wanted), (found, got) = passed(4096), passed(64)
    assert distance(found, want) < 1e-5 and distance(got, wanted) < 1e-5


@pytest.mark.parametrize("family", RECURRENT)
def test_completions_of_a_token_or_two_are_scored_as_longer_ones_are(family):
    """One token of a row, without a gradient, is a step of decoding elsewhere."""
    base, _ = tiny_base(family)
    for groups in (
        [Group([5], [[6, 7], [8, 9], [10, 11]], [0, 1, 2])],
        [Group([5, 6, 7], [[8], [9]], [0, 1]), Group([5, 6, 7], [[10], [11]], [2, 3])],
        [Group([5, 6], [[8, 9], [10], [11, 12]], [0, 1, 2])],
    ):
        batch = base.layout.lay_out(groups, CPU)
        with base.role(POLICY):
            want, _ = packed_logprobs(base, batch, 1.0, 64)  # with a gradient: by chunks
            with torch.no_grad():
                found, _ = packed_logprobs(base, batch, 1.0, 64)
        assert distance(found, want.detach()) < 1e-5


def test_what_a_mixer_lacks_is_not_taken_for_one():
    assert {family for family in RECURRENT if not mixers_of(tiny_base(family)[0])} == set()
    assert not mixers_of(tiny_base("mamba")[0]) and not mixers_of(tiny_base("llama")[0])
    assert CONVOLUTION in mixers_of(tiny_base("lfm2")[0])[0]._forward.__code__.co_names


def test_a_scan_s_chunk_is_no_longer_than_its_rows_need():
    assert [scan_chunk(length) for length in (1, 16, 17, 33, 64, 65, 4096)] == [16, 16, 32, 64, 64, 64, 64]
