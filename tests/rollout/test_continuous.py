"""Continuous batching on a CPU, where nothing is captured: the completions of waves, whatever runs beside them."""

from itertools import pairwise

import pytest
import torch
from tiny_models import EOS, VOCAB, save_tiny, tiny_base, tiny_tokenizer

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.host_embedding import embeddings_to_host
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.planning.limits import LOOK, SLOT_BLOCK, seen_room, slot_room
from lowmem_rlhf.rollout.continuous import ContinuousEngine
from lowmem_rlhf.rollout.engine import engine_for
from lowmem_rlhf.rollout.own_cache import OwnCacheEngine
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.shared_prompt import SharedPromptEngine
from lowmem_rlhf.rollout.slots import Slots

PROMPTS = [[5, 6, 7], list(range(10, 29)), [40, 41, 42, 43]]


@pytest.fixture
def base():
    base, _ = tiny_base("llama")
    base.tokenizer = tiny_tokenizer(list(range(EOS, VOCAB, 12)))
    return base


def sample(engine, rows: int, length: int = 20, prefill: int = 64, progress=None):
    limits = RolloutLimits(rows, prefill, 8)
    return engine.generate(PROMPTS, 4, length, Sampling(), limits, seed=2, progress=progress)


@pytest.mark.parametrize("rows", [12, 7, 5, 1])
@pytest.mark.parametrize("prefill", [64, 4])
def test_completions_are_those_of_waves_whatever_runs_beside_them(base, rows, prefill):
    with base.role(POLICY):
        waves = sample(SharedPromptEngine(base), 12)
        engine = ContinuousEngine(base)
        found = sample(engine, rows, prefill=prefill)
    for ours, theirs in zip(found, waves, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.ids, a.truncated) == (b.ids, b.truncated)
            assert torch.allclose(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-5)
    assert engine.passes >= max(len(one.ids) for own in found for one in own) - 1


@pytest.mark.parametrize("length", [1, 2, LOOK, LOOK + 1, LOOK + 2])
def test_lengths_around_a_look(base, length):
    with base.role(POLICY):
        few, all_at_once = sample(ContinuousEngine(base), 5, length), sample(SharedPromptEngine(base), 12, length)
    assert [[one.ids for one in own] for own in few] == [[one.ids for one in own] for own in all_at_once]
    assert max(len(one.ids) for own in few for one in own) == length


@pytest.mark.parametrize("engine", [ContinuousEngine, SharedPromptEngine, OwnCacheEngine])
def test_each_prompt_may_have_its_own_length(base, engine):
    """What a completion is cut at changes nothing of it before, nor of the others."""
    limits = RolloutLimits(5, 64, 8)
    with base.role(POLICY):
        whole = engine(base).generate(PROMPTS, 4, 20, Sampling(), limits, seed=2)
        cut = engine(base).generate(PROMPTS, 4, [3, 20, 1], Sampling(), limits, seed=2)
    for most, own, same in zip([3, 20, 1], cut, whole, strict=True):
        assert [one.ids for one in own] == [one.ids[:most] for one in same]
        assert [one.truncated for one in own] == [len(one.ids) > most or one.truncated for one in same]
    assert max(len(one.ids) for one in cut[0]) == 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_s_last_position_is_reached_and_never_passed(family):
    """A slot that has ended runs on until it is looked at, where there may be no position any more."""
    longest = max(len(prompt) for prompt in PROMPTS)
    base, _ = tiny_base(
        family, max_position_embeddings=longest + 21, **({"n_positions": longest + 21} if family == "gpt2" else {})
    )
    base.tokenizer = tiny_tokenizer(list(range(EOS, VOCAB, 30)))
    with base.role(POLICY):
        waves, found = sample(SharedPromptEngine(base), 12, 21), sample(ContinuousEngine(base), 5, 21)
    assert max(len(one.ids) for one in waves[1]) == 21 > min(len(one.ids) for own in waves for one in own)
    assert [[one.ids for one in own] for own in found] == [[one.ids for one in own] for own in waves]


def test_progress_counts_completions(base):
    told = []
    with base.role(POLICY):
        sample(ContinuousEngine(base), 5, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (12, 12) and told == sorted(told)


def test_a_cpu_says_why_nothing_is_captured_and_takes_waves_by_itself(base):
    engine = ContinuousEngine(base)
    assert engine.note == (
        "decoding starts its kernels one by one, since it cannot be captured as a graph: torch has none for cpu"
    )
    assert type(engine_for(base)) is SharedPromptEngine
    assert type(engine_for(base, "continuous")) is ContinuousEngine


def test_a_model_that_cannot_be_packed_has_no_slots():
    base, _ = tiny_base("bloom")
    with pytest.raises(UserError, match=r"generation\.engine: continuous is not for 'tiny/bloom'; leave it at auto"):
        engine_for(base, "continuous")


def test_positions_that_depend_on_other_texts_have_no_slots():
    factors = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base, _ = tiny_base("llama", rope_parameters=factors)
    with pytest.raises(UserError, match=r"generation\.engine: continuous is not for 'tiny/llama', whose positions"):
        engine_for(base, "continuous")


def test_what_waits_for_the_device_is_not_captured(base, monkeypatch):
    monkeypatch.setattr("lowmem_rlhf.rollout.graphs.can_capture", lambda device: True)
    engine = ContinuousEngine(base)
    assert not engine.note and base.captures
    embeddings_to_host(base.model)
    assert not base.captures
    with base.role(POLICY):
        sample(engine, 5)
    assert engine.note.endswith("captured as a graph: a pass of this model waits for the device")


def test_a_slot_at_rest_leaves_numbers_for_the_next_rollout():
    """A window may hide all that the others' passes still read from where a long text has ended."""
    base, _ = tiny_base("gemma2", max_position_embeddings=256)
    base.tokenizer = tiny_tokenizer(list(range(EOS, VOCAB, 5)))
    prompts = [[n % 90 + 4 for n in range(150)], [5, 6, 7], [7, 8, 9], [9, 10, 11]]
    engine, limits = ContinuousEngine(base), RolloutLimits(8, 256, 8, keep_graphs=True)
    with base.role(POLICY):
        for seed in range(6):
            engine.generate(prompts, 2, 30, Sampling(), limits, seed=seed)
            assert all(x.isfinite().all() for x in (*engine._slots._keys.values(), *engine._slots._values.values()))


def test_scales_of_joined_weights_go_with_the_decoding(tmp_path):
    folder = save_tiny("qwen2", tmp_path)
    base = SharedBase.load(str(folder), torch.device("cpu"), "nf4", "float32", join=True, r=4)
    group = next(group for group in base.grouped_layers if len(group.layers) == 3)
    group.joined = lambda x: x
    with base.decoding(False):
        pass
    assert group.joined is None
    base.hold()
    group.joined = lambda x: x
    with base.decoding(False):
        pass
    assert group.joined is not None
    base.let_go()
    assert group.joined is None


def test_logits_that_are_not_finite_end_the_rollout_and_leave_nothing_held(base):
    with torch.no_grad():
        base.model.lm_head.weight[5] = float("nan")
    engine = ContinuousEngine(base)
    with base.role(POLICY), pytest.raises(RunError, match="the model's logits are not finite"):
        sample(engine, 5)
    assert engine._slots is None and not any(group._held for group in base.grouped_layers)


def test_what_is_kept_serves_smaller_rollouts_and_is_released():
    base, _ = tiny_base("qwen2")
    limits = RolloutLimits(6, 64, 8, keep_graphs=True)
    engine = ContinuousEngine(base)

    def kept(prompts, sampling=Sampling(), length=9):  # noqa: B008
        engine.generate(prompts, 2, length, sampling, limits, seed=0)
        return engine._slots

    with base.role(POLICY):
        first = kept(PROMPTS)
        assert kept(PROMPTS) is first and kept([p[:2] for p in PROMPTS]) is first
        assert kept(PROMPTS, length=90) is not first  # more room
        assert kept(PROMPTS, Sampling(top_k=3)) is not kept(PROMPTS)
        with base.role("reference"):
            assert kept(PROMPTS) is not first
    engine.release()
    assert engine._slots is None and not any(group._held for group in base.grouped_layers)


@pytest.mark.parametrize(("rows", "differing", "agree"), [(3, 0, True), (3, 1, False), (8, 1, True), (8, 2, False)])
@pytest.mark.parametrize("how", ["token", "log-prob", "not a number"])
def test_one_row_of_several_may_be_drawn_on_the_edge(base, rows, differing, agree, how):
    slots = Slots(base, rows, 64, Sampling(), 8)
    slots.reset()
    one, other = (slots.restore(slots.save()) for _ in range(2))
    if how == "token":
        other.view(torch.long)[:differing, 0] = 7
    else:
        other[:differing, 2] = 0.1 if how == "log-prob" else float("nan")
    assert slots.agree(one, other) is agree


def test_the_room_of_a_slot_and_what_a_pass_reads_of_it():
    assert slot_room(100, 20) == 128 and slot_room(100, 20 + LOOK) == 192
    seen = sorted({seen_room(tokens, 1024) for tokens in range(1, 1025)})
    assert seen[0] == SLOT_BLOCK and seen[-1] == 1024 and all(one % SLOT_BLOCK == 0 for one in seen)
    assert all(seen_room(tokens, 1024) >= tokens for tokens in range(1, 1025))
    assert len(seen) <= 10 and all(b <= 2 * a for a, b in pairwise(seen))
