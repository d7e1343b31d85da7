"""repetition_penalty, min_new_tokens and stop_strings: against transformers, and the same in every engine."""

import random
from types import SimpleNamespace

import pytest
import torch
from tiny_models import EOS, VOCAB, byte_tokenizer, tiny_base, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
)

from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.planning.memory.rollout import sampling_logits_bytes
from lowmem_rlhf.recipe.sections import GenerationConfig
from lowmem_rlhf.rollout import continuous
from lowmem_rlhf.rollout.continuous import ContinuousEngine
from lowmem_rlhf.rollout.draws import seen_tokens
from lowmem_rlhf.rollout.ends import Ends, TokenBytes
from lowmem_rlhf.rollout.engine import wave_engine
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.rollout.sampling import LARGEST, Sampling, draw
from lowmem_rlhf.rollout.shared_prompt import SharedPromptEngine
from lowmem_rlhf.rollout.stream import stream

PROMPTS = [[5, 6, 7, 5], list(range(10, 29)), [40, 41, 42, 43]]
LIMITS = RolloutLimits(rows=12, prefill_tokens=24, tile=5)
TEXTS = ["the stopper stops at naïve café — 東京東", "abc abd\n\nstop", "12 apples, 7 left.\n"] * 4


def stopping_base(family="llama"):
    base, stock = tiny_base(family, adapter=0.0)
    base.tokenizer = tiny_tokenizer(list(range(EOS, VOCAB, 12)))
    return base, stock


def flat(groups):
    return [(one.ids, one.truncated) for group in groups for one in group]


@pytest.mark.parametrize("penalty", [1.3, 0.6])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_those_of_the_processors_of_transformers(penalty, temperature, dtype):
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn((6, 40), generator=generator)).to(dtype)
    ids = torch.randint(0, 40, (6, 15), generator=generator)
    uniforms = torch.rand((6,), generator=generator).clamp_(max=LARGEST)
    seen = torch.zeros((6, 40), dtype=torch.bool).scatter_(1, ids, True)
    stops = torch.zeros(40, dtype=torch.bool).index_fill_(0, torch.tensor([4, 9]), True)
    scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.float())
    scores = MinNewTokensLengthLogitsProcessor(10, 6, [4, 9])(ids, scores)
    tokens, logps = draw(logits, uniforms, Sampling(temperature, repetition_penalty=penalty), stops, seen=seen)
    if temperature:
        total = (scores.double() / temperature).softmax(-1).cumsum(-1)
        want = torch.searchsorted(total, uniforms.double()[:, None] * total[:, -1:], right=True)[:, 0]
    else:
        want = scores.argmax(-1)
    assert tokens.tolist() == want.tolist()
    plain = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # as it is trained on: without any of it
    torch.testing.assert_close(logps, plain.gather(-1, tokens[:, None])[:, 0])


def generated(stock, prompt, **given):
    """Return the greedy completion of at most 20 tokens that transformers writes."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = stock.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0, **given)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3_5"])
def test_greedy_completions_are_those_of_generate(family):
    """Of engines of waves, packed or padded, and of slots where the model has them."""
    base, stock = stopping_base(family)
    given = {"repetition_penalty": 1.5, "min_new_tokens": 7}
    with base.role(POLICY):
        engines = [wave_engine(base), *([ContinuousEngine(base)] if base.packable else [])]
        found = [flat(engine.generate(PROMPTS, 1, 20, Sampling(0.0, **given), LIMITS, seed=0)) for engine in engines]
        free = flat(wave_engine(base).generate(PROMPTS, 1, 20, Sampling(0.0), LIMITS, seed=0))
    stops = sorted(base.stop_ids)
    for row, prompt in enumerate(PROMPTS):
        want = generated(stock, prompt, eos_token_id=stops, **given)
        assert [own[row] for own in found] == [(want, want[-1] not in stops)] * len(engines)
        assert len(want) >= 7
    assert free != found[0]


def test_greedy_completions_end_where_generate_ends_at_a_stop_string():
    base, stock = tiny_base("llama", adapter=0.0, vocab_size=260)
    base.tokenizer = byte_tokenizer()
    sampling = Sampling(0.0, repetition_penalty=1.7)  # so that its text does not go round
    with base.role(POLICY):
        free = SharedPromptEngine(base).generate(PROMPTS, 1, 20, sampling, LIMITS, seed=0)
        texts = [text for own in free if "\ufffd" not in (text := base.tokenizer.decode(own[0].ids[6:9]))]
        sampling = Sampling(0.0, repetition_penalty=1.7, stop_strings=tuple(texts))
        found = [
            flat(engine.generate(PROMPTS, 1, 20, sampling, LIMITS, seed=0))
            for engine in (SharedPromptEngine(base), ContinuousEngine(base))
        ]
    for row, prompt in enumerate(PROMPTS):
        want = generated(stock, prompt, repetition_penalty=1.7, stop_strings=texts, tokenizer=base.tokenizer)
        cut = not any(text in base.tokenizer.decode(want) for text in texts) and want[-1] not in base.stop_ids
        assert [own[row] for own in found] == [(want, cut)] * 2
    assert sorted({len(ids) for ids, _ in found[0]})[0] == 9


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=letters))
    return tokenizer


def byte_fallback():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [text.replace("東", "") for text in TEXTS], trainers.BpeTrainer(vocab_size=340, special_tokens=special)
    )
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"]))
    return tokenizer


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, word_piece])
def test_a_stop_string_ends_where_transformers_stop_string_criteria_ends(kind):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=kind())
    base = SimpleNamespace(tokenizer=tokenizer, stop_ids=frozenset())
    drawn, ended = random.Random(0), 0
    for text in ("stop", "\n\n", "at na", "café", "東京", "12 a", "p"):
        try:
            criteria = StopStringCriteria(tokenizer, text)
        except ValueError:  # of a text that no token has a part of
            continue
        for _ in range(8):
            ids = tokenizer("".join(drawn.sample(TEXTS, 2)), add_special_tokens=False).input_ids
            for _ in range(3):
                ids.insert(drawn.randrange(len(ids)), drawn.randrange(len(tokenizer)))
            end = Ends(base, Sampling(stop_strings=(text, "not in it"))).of_one()
            ours = next((n for n, token in enumerate(ids) if end(token)), None)
            theirs = next((n for n in range(len(ids)) if criteria(torch.tensor([ids[: n + 1]]), None)[0]), None)
            assert ours == theirs, (text, tokenizer.decode(ids))
            ended += ours is not None
    assert ended > 20


def test_the_bytes_of_tokens_are_the_text_that_they_decode_to():
    for kind in (byte_level, byte_fallback):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=kind())
        text_of = TokenBytes(tokenizer)
        for text in TEXTS[:3]:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert b"".join(text_of[token] for token in ids).decode().lstrip() == tokenizer.decode(ids)
        assert text_of[10**6] == b""


@pytest.mark.parametrize("look", [1, 3, 8])
def test_the_completions_are_the_same_however_often_the_host_looks(look, monkeypatch):
    """With all controls, in few slots that are used again, against waves that look at every token."""
    base, _ = tiny_base("llama")
    base.tokenizer = byte_tokenizer()
    strings = ("0", "5", "Aa", "<s>", "<u")
    sampling = Sampling(1.3, top_k=60, repetition_penalty=1.2, min_new_tokens=4, stop_strings=strings)
    monkeypatch.setattr(continuous, "LOOK", look)
    with base.role(POLICY):
        waves = SharedPromptEngine(base).generate(PROMPTS, 8, 30, sampling, LIMITS, seed=2)
        slots = ContinuousEngine(base).generate(PROMPTS, 8, 30, sampling, RolloutLimits(5, 24, 5), seed=2)
        few = SharedPromptEngine(base).generate(PROMPTS, 8, 30, sampling, RolloutLimits(3, 24, 2), seed=2)
        trained = completion_logprobs(
            base,
            Rollout(PROMPTS, [one for own in slots for one in own], 8).groups(range(24)),
            BatchLimits(1.3, 512, 64),
        )
    assert flat(slots) == flat(waves) == flat(few)
    assert len({len(ids) for ids, _ in flat(slots)}) > 5
    ways = set()
    for row, one in enumerate(one for own in slots for one in own):
        assert len(one.ids) == len(one.logps)
        torch.testing.assert_close(torch.tensor(one.logps), trained[row], rtol=1e-4, atol=1e-4)
        holds = [any(text in base.tokenizer.decode(one.ids[:n]) for text in strings) for n in range(len(one.ids) + 1)]
        assert not any(holds[:-1]) and one.truncated == (not holds[-1] and one.ids[-1] not in base.stop_ids)
        ways.add("cut" if one.truncated else "text" if holds[-1] else "token")
    assert ways == {"cut", "text", "token"}


def test_padded_rows_draw_the_same_however_many_run_beside_them():
    """Their waves are in another order than the prompts, and rows leave them on the way."""
    base, _ = stopping_base("bloom")
    sampling = Sampling(1.2, repetition_penalty=1.4, min_new_tokens=5)
    with base.role(POLICY):
        together, alone = (
            flat(wave_engine(base).generate(PROMPTS, 3, 16, sampling, RolloutLimits(rows, 64, 4), seed=5))
            for rows in (9, 1)
        )
    assert together == alone and min(len(ids) for ids, _ in alone) >= 5 and len({len(ids) for ids, _ in alone}) > 3


def test_a_stream_is_the_rollout_of_one_row_and_gives_what_completes_a_stop_string():
    base, _ = tiny_base("llama")
    base.tokenizer, ends = byte_tokenizer(), set()
    strings = ("0", "5", "A")
    for seed in range(4):
        for sampling in (
            Sampling(1.1, repetition_penalty=1.3, min_new_tokens=5, stop_strings=strings),
            Sampling(0.0, repetition_penalty=2.0, stop_strings=strings),
        ):
            with base.role(POLICY):
                [[want]] = wave_engine(base).generate([PROMPTS[0]], 1, 25, sampling, LIMITS, seed)
                got = list(stream(base, PROMPTS[0], 25, sampling, seed, tile=4))
            assert got == [token for token in want.ids if token not in base.stop_ids]
            ends.add(want.truncated)
    assert ends == {True, False}


@pytest.mark.parametrize("engine", [SharedPromptEngine, ContinuousEngine])
def test_a_stop_string_at_the_very_limit_is_no_cut(engine):
    base, _ = tiny_base("llama")
    base.tokenizer = byte_tokenizer()
    every = tuple(base.tokenizer.convert_ids_to_tokens(list(range(4, VOCAB))))
    with base.role(POLICY):
        found = engine(base).generate(PROMPTS, 2, 1, Sampling(stop_strings=every, min_new_tokens=1), LIMITS, seed=1)
    assert all(len(ids) == 1 and ids[0] >= 4 and not cut for ids, cut in flat(found))


def test_what_was_seen_leaves_out_tokens_that_have_no_logit():
    base, _ = tiny_base("llama")
    seen = seen_tokens(base, [[5, VOCAB + 3, 5], [7]])
    assert seen.nonzero().tolist() == [[0, 5], [1, 7]]


def test_a_recipe_says_how_to_sample_at_its_temperature_or_greedily():
    generation = GenerationConfig(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        min_new_tokens=3,
        stop_strings=["a", "b"],
    )
    assert Sampling.of(generation) == Sampling(0.7, 0.9, 5, 0.1, 1.2, 3, ("a", "b"))
    assert Sampling.of(generation, 0.0) == Sampling(0.0, 1.0, 0, 0.0, 1.2, 3, ("a", "b"))
    assert Sampling.of(generation, 1.5).temperature == 1.5 and Sampling.of(GenerationConfig()) == Sampling()
    assert GenerationConfig(stop_strings="###").controls == {"stop_strings": ["###"]}
    assert GenerationConfig(min_new_tokens=1).controls == {"min_new_tokens": 1} and not GenerationConfig().controls


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("least", [0, 2])
def test_a_draw_takes_what_the_plan_counts(temperature, dtype, width, least):
    rows, vocabulary = 8, 5000
    generation = GenerationConfig(temperature=temperature, repetition_penalty=1.2, min_new_tokens=least)
    logits = torch.randn((rows, vocabulary), dtype=torch.float32).to(dtype)
    seen = torch.zeros((rows, vocabulary), dtype=torch.bool)
    with LiveBytes(scan=False) as live:
        live.add(logits)
        missing = torch.zeros((rows, vocabulary), dtype=torch.bool) if least else None
        draw(logits, torch.full((rows,), 0.5), Sampling.of(generation), missing, seen=seen)
    counted = sampling_logits_bytes(SimpleNamespace(vocab_size=vocabulary), rows, width, generation)
    held = live.peak - seen.numel()  # which is counted by itself
    assert 0.7 * counted < held <= counted + 64 * rows
