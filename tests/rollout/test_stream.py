"""One completion token by token is the one that a rollout has."""

import pytest
import torch
from tiny_models import EOS, RECURRENT, UNPACKABLE, tiny_base

from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.stream import stream

PROMPT = [5, 17, 33, 8, 60, 41, 9]
LENGTH = 40  # more than one block of the cache
SAMPLINGS = [Sampling(0.0), Sampling(1.3), Sampling(0.9, top_p=0.9, top_k=20)]
FAMILIES = ["llama", "mistral", "gemma2", "gpt2", *RECURRENT, *UNPACKABLE]  # packable ones and padded ones


def rollout_of(base, sampling, seed, length=LENGTH):
    [[completion]] = wave_engine(base).generate([PROMPT], 1, length, sampling, RolloutLimits(1, 64, 4), seed)
    return completion


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_is_the_rollout_of_one_row(family):
    base, _ = tiny_base(family)
    base.model.generation_config.eos_token_id = [EOS, *range(20, 23)]
    ended = set()
    with base.role(POLICY):
        for sampling in SAMPLINGS:
            for seed in range(4):
                want = rollout_of(base, sampling, seed)
                got = list(stream(base, PROMPT, LENGTH, sampling, seed, tile=4))
                assert got == (want.ids if want.truncated else want.ids[:-1])
                ended.add(want.truncated)
    assert ended == {True, False} or family != "llama"


def test_a_stream_of_one_token():
    base, _ = tiny_base("llama")
    base.model.generation_config.eos_token_id = None
    with base.role(POLICY):
        want = rollout_of(base, Sampling(1.0), 2, length=1)
        assert list(stream(base, PROMPT, 1, Sampling(1.0), 2, tile=1)) == want.ids


def test_tokens_are_drawn_when_they_are_asked_for_in_the_role_of_then(monkeypatch):
    base, _ = tiny_base("llama", adapter=0.4)
    monkeypatch.setattr(type(base), "stop_ids", frozenset())
    passes = []
    base.head.module.register_forward_hook(lambda *call: passes.append(1))
    alone = {}
    for role in ("reference", POLICY):
        with base.role(role):
            alone[role] = list(stream(base, PROMPT, LENGTH, Sampling(), 3, tile=1))
    assert alone["reference"] != alone[POLICY]
    passes.clear()
    streams = {role: stream(base, PROMPT, LENGTH, Sampling(), 3, tile=1) for role in alone}
    assert not passes
    mixed = {role: [] for role in alone}
    for _ in range(LENGTH):
        for role, tokens in streams.items():
            with base.role(role):
                mixed[role].append(next(tokens))
    assert mixed == alone
    assert len(passes) == 2 * LENGTH
    assert base.active.names == ()


def test_a_stream_leaves_the_gradient_mode_as_it_was(monkeypatch):
    base, _ = tiny_base("llama")
    monkeypatch.setattr(type(base), "stop_ids", frozenset())
    tokens = stream(base, PROMPT, 4, Sampling(), 0, tile=1)
    next(tokens)
    assert torch.is_grad_enabled()
    tokens.close()
    assert torch.is_grad_enabled() and all(p.grad is None for p in base.parameters())


def test_logits_that_are_not_finite_are_said():
    base, _ = tiny_base("llama")
    with torch.no_grad():
        base.head.module.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="logits are not finite"):
        list(stream(base, PROMPT, 4, Sampling(), 0, tile=1))
