"""The estimator of pass@k and the intervals: against closed forms, enumeration and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from lowmem_rlhf.training.intervals import (
    Column,
    differences,
    effective_trials,
    estimates,
    pass_at_k,
    resampled,
    wilson,
)


def column(values, share=False) -> Column:
    """Return the column of a (P, G) table without gaps."""
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    return Column(table.sum(1), np.full(len(table), float(table.shape[1])), share)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (4, 1), (5, 3), (6, 6), (7, 0)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_correct_one(n, c):
    for k in range(1, n + 1):
        choices = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not():
    p, n, k = 0.3, 6, 3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(plug_in - mean) > 0.02


def test_pass_at_k_refuses_more_choices_than_there_are_answers():
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at_k(2, 1, 3)


def test_wilson_is_the_published_one():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson(successes / n, n) == pytest.approx((low, high), abs=5e-5)


def test_one_answer_a_problem_counts_as_one_trial_each():
    values = [1, 0, 0, 1, 1, 0, 0, 0, 0, 1]
    assert effective_trials(column(values, share=True)) == pytest.approx(10)
    got = estimates({"accuracy": column(values, share=True)})["accuracy"]
    assert (got.value, got.low, got.high) == pytest.approx((0.4, *wilson(0.4, 10)))


def test_answers_to_one_problem_count_by_how_far_they_differ():
    same = [[1, 1, 1, 1]] * 4 + [[0, 0, 0, 0]] * 6
    mixed = [[1, 0, 1, 0], [0, 1, 0, 1]] * 5
    assert effective_trials(column(same, share=True)) == pytest.approx(10)
    assert effective_trials(column(mixed, share=True)) == pytest.approx(40)
    nothing = [[0, 0, 0, 0]] * 10
    assert effective_trials(column(nothing, share=True)) == pytest.approx(10)
    got = estimates({"accuracy": column(nothing, share=True)})["accuracy"]
    assert got.low == 0 and got.high == pytest.approx(wilson(0.0, 10)[1]) and got.high > 0.2


def test_paired_differences_are_newcombe_s_method_10():
    # 50 problems: 36 right in both, 12 only in the first, 2 only in the second
    first = [1] * 36 + [1] * 12 + [0] * 2
    second = [1] * 36 + [0] * 12 + [1] * 2
    got = differences({"a": column(second, share=True)}, {"a": column(first, share=True)})["a"]
    assert got.value == pytest.approx(0.2)
    p1, p2 = 48 / 50, 38 / 50
    (l1, u1), (l2, u2) = wilson(p1, 50), wilson(p2, 50)
    phi = (36 * 0 - 12 * 2) / math.sqrt(48 * 2 * 38 * 12)
    low = 0.2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = 0.2 + math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    assert (got.low, got.high) == pytest.approx((low, high))


def test_pairing_narrows_the_difference_where_problems_hang_together():
    generator = np.random.default_rng(3)
    hard = generator.random(200)
    first, second = (hard < 0.5).astype(float), (hard < 0.6).astype(float)
    apart = generator.permutation(second)
    paired = differences({"a": column(first, True)}, {"a": column(second, True)})["a"]
    loose = differences({"a": column(first, True)}, {"a": column(apart, True)})["a"]
    assert paired.high - paired.low < 0.6 * (loose.high - loose.low)
    assert paired.low > 0


def test_nothing_differs_from_itself_and_the_difference_turns_with_its_sides():
    values = {"a": column([0.0, 1.5, 2.0, 7.0]), "b": column([0, 1, 1, 0], True)}
    same = differences(values, values)
    assert (same["a"].value, same["a"].low, same["a"].high) == (0, 0, 0)
    assert same["b"].value == 0 and same["b"].low <= 0 <= same["b"].high
    other = {"a": column([1.0, 1.0, 2.5, 3.0]), "b": column([1, 1, 1, 0], True)}
    there, back = differences(values, other), differences(other, values)
    for name in values:
        assert (there[name].value, there[name].low, there[name].high) == pytest.approx(
            (-back[name].value, -back[name].high, -back[name].low)
        )


def test_means_weigh_problems_by_their_values():
    loss = Column(np.asarray([10.0, 1.0]), np.asarray([10.0, 100.0]))
    assert estimates({"loss": loss})["loss"].value == pytest.approx(11 / 110)


def test_one_problem_has_no_interval_and_none_no_value():
    one = estimates({"a": column([3.0]), "b": Column(np.zeros(3), np.zeros(3))})
    assert list(one) == ["a"]
    assert (one["a"].value, one["a"].low, one["a"].high) == (3, None, None)


def test_the_same_seed_draws_the_same_problems_for_every_quantity():
    values = np.random.default_rng(0).normal(size=50)
    both = resampled({"a": column(values), "b": column(2 * values)})
    alone = resampled({"b": column(values)})
    assert np.array_equal(2 * both["a"], both["b"]) and np.array_equal(both["a"], alone["b"])


@pytest.mark.parametrize("truth", [0.04, 0.3, 0.9])
def test_intervals_of_shares_cover_the_truth_as_often_as_they_say(truth):
    """Problems of different difficulty, 3 answers each: 95 % of the intervals should hold the mean over problems."""
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        chance = generator.beta(4 * truth, 4 * (1 - truth), size=80)
        answers = generator.random((80, 3)) < chance[:, None]
        got = estimates({"a": column(answers, share=True)})["a"]
        covered += got.low <= truth <= got.high
    assert 0.92 <= covered / 400 <= 0.985


def test_intervals_of_differences_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(8)
    covered = {"share": 0, "mean": 0}
    for _ in range(200):
        hard = generator.random(100)
        first = np.stack([generator.random(100) < 0.3 + 0.3 * hard for _ in range(2)], axis=1)
        second = np.stack([generator.random(100) < 0.4 + 0.3 * hard for _ in range(2)], axis=1)
        noise = generator.exponential(size=(2, 100))
        a = {"share": column(first, True), "mean": column(hard + noise[0])}
        b = {"share": column(second, True), "mean": column(hard + noise[1] + 0.5)}
        got = differences(a, b)
        covered["share"] += got["share"].low <= 0.1 <= got["share"].high
        covered["mean"] += got["mean"].low <= 0.5 <= got["mean"].high
    assert all(0.91 <= n / 200 <= 0.99 for n in covered.values()), covered
