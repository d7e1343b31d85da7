"""KL estimates and coefficients, scores and token rewards, against numbers worked out by hand."""

import json
import math

import pytest
import torch

from lowmem_rlhf.algorithms.common.kl import AdaptiveKLController, FixedKLController, k1, k3, kl_estimate
from lowmem_rlhf.algorithms.common.shaping import (
    RunningMoments,
    normalize_scores,
    reward_lengths,
    shape_scores,
    token_rewards,
)

NAN = float("nan")
NONE = torch.zeros(4, dtype=torch.bool)


# ---- estimates of the divergence


def test_estimates_of_one_token():
    logps, ref = torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -0.5])
    assert k1(logps, ref).tolist() == [0.5, -0.5]
    torch.testing.assert_close(k3(logps, ref), torch.tensor([math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1]))


def test_both_estimates_have_the_divergence_as_their_expectation():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    divergence = (p * (p / q).log()).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), name)).sum(), divergence)
    assert (kl_estimate(p.log(), q.log(), "k3") > 0).all()
    assert (kl_estimate(p.log(), q.log(), "k1") < 0).any()


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match=r"kl_estimator: got 'k2'; allowed are k1 and k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k2")


# ---- the coefficient


def test_a_fixed_coefficient_stays():
    controller = FixedKLController(0.05)
    controller.update(100.0, 64)
    assert controller.value == 0.05


# divergence, factor for 64 completions, target 6 nats, horizon 640
ADAPTIVE = [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)]


@pytest.mark.parametrize(("current", "factor"), ADAPTIVE)
def test_an_adaptive_coefficient_follows_the_error_within_20_percent(current, factor):
    controller = AdaptiveKLController(0.2, target=6, horizon=640)
    controller.update(current, 64)
    assert controller.value == pytest.approx(0.2 * factor)


def test_an_adaptive_coefficient_compounds():
    controller = AdaptiveKLController(0.2, target=6, horizon=100)
    for current in (12.0, 12.0, 0.0):
        controller.update(current, 10)
    assert controller.value == pytest.approx(0.2 * 1.02 * 1.02 * 0.98)


@pytest.mark.parametrize("controller", [FixedKLController(0.3), AdaptiveKLController(0.3, target=1, horizon=50)])
def test_a_controllers_state_goes_through_json(controller):
    controller.update(9.0, 50)
    kept = json.loads(json.dumps(controller.state_dict()))
    before = controller.value
    controller.value = 17.0
    controller.load_state_dict(kept)
    assert controller.value == before


def test_what_an_adaptive_coefficient_cannot_work_with_is_refused():
    for target, horizon in ((0, 100), (6, 0), (-1, 100)):
        with pytest.raises(ValueError, match="both must be above 0"):
            AdaptiveKLController(0.2, target=target, horizon=horizon)
    controller = AdaptiveKLController(0.2, target=6, horizon=100)
    with pytest.raises(ValueError, match="a divergence of nan"):
        controller.update(NAN, 10)
    with pytest.raises(ValueError, match="got 101 completions for a horizon of 100"):
        controller.update(6.0, 101)
    assert controller.value == 0.2


# ---- scores


def test_scores_are_normalised_by_the_batch():
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, squares 14 over 3
    want = (scores - 3) / (math.sqrt(14 / 3) + 1e-4)
    torch.testing.assert_close(normalize_scores(scores, "batch"), want)
    assert normalize_scores(torch.full((3,), 5.0), "batch").tolist() == [0, 0, 0]
    assert normalize_scores(torch.tensor([5.0]), "batch").tolist() == [0]
    assert torch.equal(normalize_scores(scores, "none"), scores)


def test_running_moments_are_those_of_all_scores_together():
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([-4.0, 1000.0, 6.0])]
    moments = RunningMoments()
    for i, batch in enumerate(batches):
        got = normalize_scores(batch, "running", moments)
        seen = torch.cat(batches[: i + 1]).double()
        assert (moments.count, moments.mean) == (len(seen), pytest.approx(seen.mean().item()))
        assert moments.std == pytest.approx(seen.std().item())
        torch.testing.assert_close(got, ((batch - seen.mean()) / (seen.std() + 1e-4)).float())


def test_running_moments_go_through_json():
    moments, copy = RunningMoments(), RunningMoments()
    moments.update(torch.tensor([1.0, 2.0, 4.0]))
    copy.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    assert copy == moments
    assert copy.std == pytest.approx(math.sqrt(7 / 3))


def test_what_scores_cannot_be_normalised_by_is_refused():
    with pytest.raises(ValueError, match=r"normalize_scores: got 'std'; allowed are none, batch and running"):
        normalize_scores(torch.ones(2), "std")
    with pytest.raises(ValueError, match="'running' needs the moments"):
        normalize_scores(torch.ones(2), "running")


def test_scores_are_clipped_then_penalised_for_a_missing_eos():
    scores, truncated = torch.tensor([-7.0, 0.5, 9.0, 1.0]), torch.tensor([True, False, False, True])
    assert shape_scores(scores, truncated).tolist() == scores.tolist()
    assert shape_scores(scores, truncated, cliprange_reward=2.0).tolist() == [-2, 0.5, 2, 1]
    assert shape_scores(scores, truncated, missing_eos_penalty=1.5).tolist() == [-8.5, 0.5, 9, -0.5]
    assert shape_scores(scores, truncated, cliprange_reward=2.0, missing_eos_penalty=1.5).tolist() == [
        -3.5,
        0.5,
        2,
        -0.5,
    ]


def test_scores_are_normalised_before_they_are_clipped_and_penalised():
    scores = torch.tensor([100.0, 200.0, 300.0, 600.0])
    normal = normalize_scores(scores, "batch")
    got = shape_scores(scores, ~NONE, normalize="batch", cliprange_reward=1.0, missing_eos_penalty=0.5)
    torch.testing.assert_close(got, normal.clamp(-1, 1) - 0.5)
    assert got[-1] == 0.5
    moments = RunningMoments()
    torch.testing.assert_close(shape_scores(scores, NONE, normalize="running", moments=moments), normal)
    assert moments.count == 4


def test_scores_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="2 of 4 are not finite"):
        shape_scores(torch.tensor([1.0, NAN, math.inf, 0.0]), NONE)
    with pytest.raises(ValueError, match=r"missing_eos_penalty: got -1.0"):
        shape_scores(torch.ones(4), NONE, missing_eos_penalty=-1.0)
    with pytest.raises(ValueError, match=r"cliprange_reward: got 0.0"):
        shape_scores(torch.ones(4), NONE, cliprange_reward=0.0)


# ---- rewards of tokens


KL = torch.tensor([[0.5, 1.0, NAN], [2.0, NAN, NAN], [0.1, -0.2, 0.3]])
SCORES, LENGTHS = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2, 1, 3])


def test_the_score_is_on_the_last_real_token():
    got = token_rewards(KL, SCORES, LENGTHS, kl_coef=0.5)
    torch.testing.assert_close(got, torch.tensor([[-0.25, 9.5, 0], [19.0, 0, 0], [-0.05, 0.1, 29.85]]))


def test_trls_place_is_one_later_where_there_is_one():
    got = token_rewards(KL, SCORES, LENGTHS, kl_coef=0.5, score_position="after_last")
    torch.testing.assert_close(got, torch.tensor([[-0.25, -0.5, 10.0], [-1.0, 20.0, 0], [-0.05, 0.1, 29.85]]))


def test_positions_with_a_reward():
    assert reward_lengths(LENGTHS, 3).tolist() == [2, 1, 3]
    assert reward_lengths(LENGTHS, 3, "after_last").tolist() == [3, 2, 3]
    with pytest.raises(ValueError, match=r"score_position: got 'first'; allowed are last and after_last"):
        reward_lengths(LENGTHS, 3, "first")


def test_a_completion_without_a_token_has_no_place_for_its_score():
    with pytest.raises(ValueError, match=r"lengths: got \[0\] tokens"):
        token_rewards(KL, SCORES, torch.tensor([2, 0, 3]), kl_coef=0.5)
