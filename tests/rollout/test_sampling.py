"""The sampler's token frequencies against the exact distribution."""

import math

import pytest
import torch

from lowmem_rlhf.rollout.sampling import Sampling, draw

V, N = 24, 40_000


def logits():
    return 1.5 * torch.randn(V, generator=torch.Generator().manual_seed(3))


def exact(row, sampling):
    """Return the probabilities (V,) by the definition of each filter, token by token."""
    p = torch.softmax(row.double() / sampling.temperature, -1)
    keep = [True] * len(p)
    if sampling.min_p:
        keep = [k and float(x) >= sampling.min_p * float(p.max()) for k, x in zip(keep, p, strict=True)]
    if sampling.top_k:
        best = sorted(range(len(p)), key=lambda i: -float(p[i]))[: sampling.top_k]
        keep = [k and i in best for i, k in enumerate(keep)]
    p = torch.where(torch.tensor(keep), p, 0.0)
    if sampling.top_p < 1:
        total, sum_before = float(p.sum()), 0.0
        for i in sorted(range(len(p)), key=lambda i: -float(p[i])):
            share = float(p[i])
            if sum_before >= sampling.top_p * total:
                p[i] = 0.0
            sum_before += share
    return p / p.sum()


def chi_square(counts, probabilities):
    """Return the standardised statistic, about normal with mean 0 and deviation 1, over the possible tokens."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    freedom = int(possible.sum()) - 1
    return (statistic - freedom) / max(1.0, (2 * freedom) ** 0.5)


CASES = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7),
    Sampling(top_k=5),
    Sampling(top_k=1000),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=0.8, top_k=10, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("sampling", CASES)
def test_token_frequencies_are_the_exact_distribution(sampling):
    row = logits()
    uniforms = torch.rand(N, generator=torch.Generator().manual_seed(4))
    tokens, logps = draw(row.repeat(N, 1), uniforms, sampling)
    counts = torch.bincount(tokens, minlength=V).double()
    assert abs(chi_square(counts, exact(row, sampling))) < 4
    # and the log-prob is that of the whole distribution at this temperature, which is what training computes
    want = torch.log_softmax(row.double() / sampling.temperature, -1)[tokens]
    torch.testing.assert_close(logps.double(), want, rtol=1e-5, atol=1e-5)


def test_the_chi_square_bound_can_fail():
    uniforms = torch.rand(N, generator=torch.Generator().manual_seed(4))
    tokens, _ = draw(logits().repeat(N, 1), uniforms, Sampling(temperature=1.05))
    counts = torch.bincount(tokens, minlength=V).double()
    assert abs(chi_square(counts, exact(logits(), Sampling()))) > 4


def test_greedy_takes_the_likeliest_token_and_its_log_prob():
    rows = torch.randn(50, V, generator=torch.Generator().manual_seed(5))
    tokens, logps = draw(rows.clone(), torch.rand(50), Sampling(temperature=0.0, top_k=3, top_p=0.5))
    assert torch.equal(tokens, rows.argmax(-1))
    torch.testing.assert_close(logps, rows.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("vocabulary", [3, 151_936])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=2), Sampling(top_p=0.5), Sampling(min_p=0.3)])
def test_tokens_of_probability_zero_are_never_drawn(sampling, vocabulary):
    """At both ends of the uniform numbers, with impossible tokens at both ends of the vocabulary."""
    row = torch.full((vocabulary,), float("-inf"))
    middle = vocabulary // 2
    row[middle] = 0.0
    if vocabulary > 3:
        row[middle + 1 : middle + 4] = torch.tensor([-0.5, -20.0, -1.0])
    uniforms = torch.tensor([0.0, 1e-38, 1e-8, 0.5, 1 - 2**-23, 1 - 2**-24])
    tokens, logps = draw(row.repeat(len(uniforms), 1), uniforms, sampling)
    assert torch.isfinite(row[tokens]).all(), tokens
    assert torch.isfinite(logps).all()
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        assert set(tokens.tolist()) <= {middle, middle + 1, middle + 3}


def test_a_large_flat_vocabulary_is_reached_in_all_parts():
    """fp32 sums over 150,000 equal tokens neither starve the end nor leave the vocabulary."""
    vocabulary, n = 151_936, 600
    generator = torch.Generator().manual_seed(6)
    drawn = [
        draw(torch.zeros(100, vocabulary), torch.rand(100, generator=generator), Sampling())[0] for _ in range(n // 100)
    ]
    tokens = torch.cat(drawn)
    assert tokens.max() < vocabulary
    counts = torch.histc(tokens.double(), bins=10, min=0, max=vocabulary)
    assert abs(chi_square(counts, torch.full((10,), 0.1, dtype=torch.float64))) < 4


def test_a_row_is_drawn_the_same_in_any_batch():
    rows = torch.randn(9, V, generator=torch.Generator().manual_seed(7))
    uniforms = torch.rand(9, generator=torch.Generator().manual_seed(8))
    sampling = Sampling(temperature=0.9, top_p=0.9, top_k=12)
    together = draw(rows.clone(), uniforms, sampling)[0]
    alone = [int(draw(rows[i : i + 1].clone(), uniforms[i : i + 1], sampling)[0]) for i in range(9)]
    assert together.tolist() == alone


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_a_token_of_the_vocabulary_and_a_log_prob_that_tells(value):
    logits = torch.zeros(2, 7)
    logits[1] = value
    token, logp = draw(logits, torch.tensor([0.5, 0.5]), Sampling())
    assert token.max() < 7
    assert math.isfinite(logp[0]) and not math.isfinite(logp[1])


@pytest.mark.parametrize("sampling", [*CASES, Sampling(temperature=0.0)])
def test_many_draws_of_one_row_are_the_draws_of_repeated_rows(sampling):
    rows = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(3, 50, generator=torch.Generator().manual_seed(2))
    tokens, logps = draw(rows, uniforms, sampling)
    repeated, their_logps = draw(rows.repeat_interleave(50, 0), uniforms.flatten(), sampling)
    assert tokens.shape == logps.shape == (3, 50)
    assert torch.equal(tokens.flatten(), repeated)
    assert torch.equal(logps.flatten(), their_logps)
