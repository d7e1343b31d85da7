"""Rollouts: the decoding path against the training pass, stock generate() and the exact distribution."""

import itertools

import pytest
import torch
from tiny_models import CPU, EOS, FAMILIES, VOCAB, fill_adapter, tiny_base, tiny_model, tiny_tokenizer

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.rollout import shared_prompt as rollout_module
from lowmem_rlhf.rollout.cache import SharedPromptCache
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.shared_prompt import waves

LIMITS = RolloutLimits(rows=64, prefill_tokens=24, tile=5)


def ragged_prompts(seed=0, lengths=(7, 3, 1, 12, 7)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def stopping_base(family="llama", stops=(EOS, 20, 21, 22, 23, 24, 25, 26, 27, 28), **changes):
    """Return a base that stops at many ids, so that completions end at very different lengths."""
    base, stock = tiny_base(family, **changes)
    base.model.generation_config.eos_token_id = list(stops)
    assert base.stop_ids == set(stops)
    return base, stock


def tokens_of(completions):
    return [[c.ids for c in group] for group in completions]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_log_probs_are_those_of_the_training_pass(family):
    """With shared prompts, ragged lengths, windows smaller than the texts, and compaction along the way."""
    base, _ = stopping_base(family, stops=(EOS, 20, 21, 22))
    prompts, temperature, groups = ragged_prompts(), 1.6, 4
    with base.role(POLICY):
        rollout = wave_engine(base).generate(prompts, groups, 40, Sampling(temperature), LIMITS, seed=3)
        flat = [c for group in rollout for c in group]
        batch = Rollout(prompts, flat, groups)
        scored = completion_logprobs(base, batch.groups(range(len(flat))), BatchLimits(temperature, 200, 16))
    with base.role("reference"):
        other = completion_logprobs(base, batch.groups(range(len(flat))), BatchLimits(temperature, 200, 16))
    lengths = {len(c.ids) for c in flat}
    assert len(lengths) > 4
    assert max(lengths) > 32  # the room for completion tokens had to grow
    for row, completion in enumerate(flat):
        torch.testing.assert_close(torch.tensor(completion.logps), scored[row], rtol=1e-4, atol=1e-4)
    difference = torch.cat([scored[n] - other[n] for n in scored]).abs().max()
    assert difference > 1e-2  # the adapter took part


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family):
    base, stock = tiny_base(family, adapter=0.0)
    base.model.generation_config.eos_token_id = EOS
    prompts = ragged_prompts()
    with base.role(POLICY):
        got = wave_engine(base).generate(prompts, 1, 24, Sampling(temperature=0.0), LIMITS, seed=0)
    stock.generation_config.eos_token_id = EOS
    for prompt, [completion] in zip(prompts, got, strict=True):
        want = stock.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert completion.ids == want.tolist()


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_the_same_seed_gives_the_same_completions_however_they_are_batched(family):
    base, _ = stopping_base(family)
    prompts = ragged_prompts()

    def run(rows, prefill=24, tile=5, seed=3):
        with base.role(POLICY):
            return wave_engine(base).generate(
                prompts, 4, 24, Sampling(0.9, top_p=0.95), RolloutLimits(rows, prefill, tile), seed
            )

    want = run(64)
    assert [len(group) for group in want] == [4] * len(prompts)
    for rows, prefill, tile in ((1, 24, 5), (3, 1, 1), (7, 1000, 1000)):
        got = run(rows, prefill, tile)
        assert tokens_of(got) == tokens_of(want)
        assert [[c.truncated for c in g] for g in got] == [[c.truncated for c in g] for g in want]
        torch.testing.assert_close(
            torch.tensor([x for g in got for c in g for x in c.logps]),
            torch.tensor([x for g in want for c in g for x in c.logps]),
            rtol=1e-4,
            atol=1e-5,
        )
    assert tokens_of(run(64, seed=4)) != tokens_of(want)
    siblings = [tuple(c.ids) for c in want[0]]
    assert len(set(siblings)) > 1


# number of prompts, completions a prompt, rows at once, completions of each wave
WAVES = [
    pytest.param(5, 4, 64, [20], id="all-at-once"),
    pytest.param(5, 4, 20, [20], id="just-fits"),
    pytest.param(5, 4, 16, [12, 8], id="even-not-16-and-4"),
    pytest.param(5, 4, 7, [4] * 5, id="whole-groups"),
    pytest.param(5, 4, 3, [2] * 10, id="half-a-group-not-3-and-1"),
    pytest.param(2, 5, 4, [3, 2, 3, 2], id="parts-of-a-group"),
    pytest.param(5, 4, 1, [1] * 20, id="one-by-one"),
    pytest.param(5, 1, 3, [3, 2], id="one-completion-a-prompt"),
]


@pytest.mark.parametrize(("prompts", "groups", "rows", "sizes"), WAVES)
def test_waves_are_even_and_of_whole_groups_longest_prompts_first(prompts, groups, rows, sizes):
    lengths = [7, 3, 1, 12, 7][:prompts]
    found = waves(lengths, groups, rows)
    assert [len(wave) for wave in found] == sizes
    assert sorted(row for wave in found for _, row in wave) == list(range(prompts * groups))
    assert all(b == row // groups for wave in found for b, row in wave)
    assert all(wave == sorted(wave) for wave in found)
    for wave, later in itertools.pairwise(found):
        assert min(lengths[b] for b, _ in wave) >= max(lengths[b] for b, _ in later)
    for wave in found:  # no spare slot in the cache
        assert len({sum(b == of for of, _ in wave) for b, _ in wave}) == 1


def test_the_rollout_begins_with_its_longest_prompts(monkeypatch):
    base, _ = tiny_base("llama")
    prompts, filled = ragged_prompts(), []
    prefill = rollout_module.prefill

    def noted(base, wave, *args):
        filled.append(sorted(len(prompt) for prompt in wave))
        return prefill(base, wave, *args)

    monkeypatch.setattr(rollout_module, "prefill", noted)
    with base.role(POLICY):
        rollout = wave_engine(base).generate(prompts, 2, 4, Sampling(), RolloutLimits(4, 24, 5), seed=1)
    assert filled == [[7, 12], [3, 7], [1]]
    assert [len(group) for group in rollout] == [2] * 5


@pytest.mark.parametrize("length", [1, 4])
def test_the_first_logits_are_made_once_a_prompt(length, monkeypatch):
    base, _ = tiny_base("llama")
    monkeypatch.setattr(type(base), "stop_ids", frozenset())
    prompts, groups, positions = ragged_prompts(), 6, []
    hook = base.head.module.register_forward_hook(lambda module, args, out: positions.append(args[0].shape[0]))
    with base.role(POLICY):
        rollout = wave_engine(base).generate(prompts, groups, length, Sampling(), LIMITS, seed=5)
    hook.remove()
    assert sum(positions) == len(prompts) + len(prompts) * groups * (length - 1)
    assert max(positions) <= LIMITS.tile
    assert len({c.ids[0] for c in rollout[0]}) > 1  # a draw of its own for each


def test_a_role_decides_what_is_sampled():
    base, _ = tiny_base("llama", adapter=0.4)
    results = []
    for role in (POLICY, "reference"):
        with base.role(role):
            results.append(tokens_of(wave_engine(base).generate(ragged_prompts(), 2, 8, Sampling(), LIMITS, seed=1)))
    assert results[0] != results[1]


def test_completions_stop_at_any_stop_id_and_say_when_they_were_cut():
    base, _ = stopping_base()
    with base.role(POLICY):
        rollout = wave_engine(base).generate(ragged_prompts(), 16, 12, Sampling(), LIMITS, seed=5)
    flat = [c for group in rollout for c in group]
    ended = [c for c in flat if not c.truncated]
    assert len({c.ids[-1] for c in ended}) > 2  # several different stop ids
    assert {c.truncated for c in flat} == {True, False}
    for c in flat:
        assert len(c.ids) == len(c.logps)
        assert not set(c.ids[:-1]) & base.stop_ids
        assert c.truncated == (c.ids[-1] not in base.stop_ids)
        assert len(c.ids) == 12 if c.truncated else len(c.ids) <= 12


def test_a_stop_token_at_the_very_limit_is_not_truncated():
    base, _ = tiny_base("llama")
    base.model.generation_config.eos_token_id = list(range(VOCAB))
    with base.role(POLICY):
        rollout = wave_engine(base).generate(ragged_prompts(), 3, 1, Sampling(), LIMITS, seed=5)
    assert all(len(c.ids) == 1 and not c.truncated for group in rollout for c in group)


@pytest.mark.parametrize("rows", [1, 64])
def test_a_maximum_length_of_one(rows):
    base, _ = tiny_base("llama")
    with base.role(POLICY):
        rollout = wave_engine(base).generate(ragged_prompts(), 3, 1, Sampling(), RolloutLimits(rows, 24, 5), seed=5)
    flat = [c for group in rollout for c in group]
    assert len(flat) == 15
    assert all(len(c.ids) == len(c.logps) == 1 for c in flat)
    assert all(c.truncated == (c.ids[0] not in base.stop_ids) for c in flat)


def test_without_any_stop_id_everything_is_truncated():
    base = SharedBase(tiny_model("llama", eos_token_id=None), tiny_tokenizer(None), "tiny", r=4)
    base.model.generation_config.eos_token_id = None
    with base.role(POLICY):
        rollout = wave_engine(base).generate(ragged_prompts(), 2, 5, Sampling(), LIMITS, seed=5)
    assert all(c.truncated and len(c.ids) == 5 for group in rollout for c in group)


def test_progress_ends_at_all_completions():
    base, _ = stopping_base()
    calls = []
    with base.role(POLICY):
        wave_engine(base).generate(
            ragged_prompts(), 4, 12, Sampling(), RolloutLimits(7, 24, 5), 1, lambda *call: calls.append(call)
        )
    assert calls[-1] == (20, 20)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_sampling_leaves_no_graph_and_changes_nothing():
    base, _ = tiny_base("llama")
    before = {name: p.clone() for name, p in base.peft.named_parameters()}
    base.set_gradient_checkpointing(True)
    with base.role(POLICY):
        wave_engine(base).generate(ragged_prompts(), 2, 5, Sampling(), LIMITS, seed=5)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in base.peft.named_parameters())


def exact_pairs(stock, prompt, stops):
    """Return the probability of every text (first token,) that stops at once, or (first, second)."""
    vocabulary = stock.config.vocab_size
    with torch.no_grad():
        first = stock(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        continued = torch.tensor([[*prompt, token] for token in range(vocabulary)])
        second = stock(input_ids=continued).logits[:, -1].double().softmax(-1)
    pairs = {}
    for a in range(vocabulary):
        if a in stops:
            pairs[(a,)] = float(first[a])
        else:
            pairs |= {(a, b): float(first[a] * second[a, b]) for b in range(vocabulary)}
    return pairs


@pytest.mark.parametrize("rows", [4000, 37], ids=["all-at-once", "waves"])
def test_two_token_texts_have_their_exact_probabilities(rows):
    """Shared prompts of different lengths; a third of the rows leaves after the first token, so the batch shrinks."""
    stops = (EOS, 5, 6, 7)
    base, stock = tiny_base("llama", adapter=0.0, vocab_size=12)
    base.model.generation_config.eos_token_id = list(stops)
    prompts = [[4, 9, 10, 8, 11], [8, 10]]
    n = 3000 if rows > 100 else 1000
    with base.role(POLICY):
        # three tokens are written, so that the second one comes from a batch that was compacted or not
        rollout = wave_engine(base).generate(prompts, n, 3, Sampling(), RolloutLimits(rows, 64, 512), seed=9)
    shares = []
    for prompt, completions in zip(prompts, rollout, strict=True):
        counts = {}
        for c in completions:
            counts[tuple(c.ids[:2])] = counts.get(tuple(c.ids[:2]), 0) + 1
        pairs = exact_pairs(stock, prompt, stops)
        assert counts.keys() <= pairs.keys()
        shares.append(sum(counts.get((s,), 0) for s in stops) / n)
        # texts that are expected less than 5 times count together
        large = {pair: p for pair, p in pairs.items() if p * n >= 5}
        rest = 1 - sum(large.values())
        observed = [(counts.get(pair, 0), p * n) for pair, p in large.items()]
        observed.append((n - sum(o for o, _ in observed), rest * n))
        statistic = sum((o - e) ** 2 / e for o, e in observed if e > 0)
        freedom = len(observed) - 1
        assert freedom > 20
        assert abs(statistic - freedom) / (2 * freedom) ** 0.5 < 4
    assert max(shares) > 0.25  # otherwise nothing would have left the batch


@pytest.mark.long
def test_greedy_on_the_real_model_equals_transformers_generate(smollm2_float32):
    base, stock = smollm2_float32
    questions = ["What is 3 + 4? Reply with just the number.", "Name the capital of France."]
    prompts = [
        base.tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for q in questions
    ]
    with base.role("reference"):
        got = wave_engine(base).generate(prompts, 1, 16, Sampling(temperature=0.0), RolloutLimits(8, 512, 8), seed=0)
    for prompt, [completion] in zip(prompts, got, strict=True):
        want = stock.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=16,
        )[0, len(prompt) :]
        assert completion.ids == want.tolist()
        assert len(completion.ids) > 1


@pytest.fixture(scope="module")
def smollm2_float32(smollm2):
    """Return SmolLM2 in fp32 as a base, and as the stock model: one copy of the weights serves both in turn."""
    base = SharedBase.load(smollm2, CPU, "none", "float32")
    fill_adapter(base, size=0.02)
    return base, Stock(base)


class Stock:
    """The base's own modules under stock eager attention and stock generate()."""

    def __init__(self, base):
        self.base = base

    def generate(self, **kwargs):
        model = self.base.model
        model.set_attn_implementation("eager")
        try:
            return model.generate(**kwargs)
        finally:
            model.set_attn_implementation("lowmem")


def test_logits_that_are_not_finite_end_the_rollout_with_a_sentence():
    base, _ = tiny_base("llama")
    with torch.no_grad():
        base.head.module.weight.fill_(float("nan"))
    with base.role("policy"), pytest.raises(RunError, match="logits are not finite"):
        wave_engine(base).generate([[5, 6, 7]], 2, 4, Sampling(), RolloutLimits(8, 64, 8), seed=0)


def test_large_queries_and_keys_do_not_overflow_float16_while_decoding():
    heads, d = 4, 64
    prompt = (torch.full((2, 3, d), 40.0, dtype=torch.float16), torch.ones(2, 3, d, dtype=torch.float16))
    cache = SharedPromptCache({0: [prompt]}, {}, [prompt[0].shape[-2]], [0, 0], torch.device("cpu"), 4)
    cache.advance()
    q = torch.full((heads, 2, d), 40.0, dtype=torch.float16)  # q k = 102,400, more than float16 holds; scaled: 12,800
    k = torch.full((2, 2, d), 40.0, dtype=torch.float16)
    out = cache.attend(0, q, k, torch.ones(2, 2, d, dtype=torch.float16), d**-0.5, None, None)
    assert torch.allclose(out, torch.ones_like(out))
