"""RLOO's and REINFORCE++'s numbers, against their formulas worked out by hand."""

import math

import pytest
import torch

from lowmem_rlhf.algorithms.common.padded import token_mask
from lowmem_rlhf.algorithms.ppo.math import policy_loss
from lowmem_rlhf.algorithms.reinforce_plus_plus.math import less_group_mean, reinforce_plus_plus_advantages
from lowmem_rlhf.algorithms.rloo.math import rloo_advantages, sequence_rewards

NAN = float("nan")
KL = torch.tensor([[0.5, 1.0, NAN], [2.0, NAN, NAN], [0.1, -0.2, 0.3], [1.0, 1.0, NAN]])
LENGTHS = torch.tensor([2, 1, 3, 2])
SCORES = torch.tensor([1.0, 0.0, 3.0, 2.0])
MASK = token_mask(LENGTHS, 3)


def whitened(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [(v - mean) / math.sqrt(variance + 1e-8) for v in values]


# ---- RLOO


def test_the_reward_of_an_answer_is_its_score_less_its_divergence():
    got = sequence_rewards(SCORES, KL, LENGTHS, kl_coef=0.1)
    torch.testing.assert_close(got, torch.tensor([1 - 0.15, 0 - 0.2, 3 - 0.02, 2 - 0.2]))
    assert sequence_rewards(torch.tensor([NAN, 0.0, 0.0, 0.0]), KL, LENGTHS, 0.1).isnan().tolist() == [1, 0, 0, 0]


def test_each_reward_less_the_mean_of_the_others():
    got = rloo_advantages(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    assert got.tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5], [0 - 1.5, 0 - 1.5, 3]]


def test_leaving_one_out_stretches_the_distance_to_the_mean():
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rloo_advantages(rewards), (rewards - rewards.mean(1, keepdim=True)) * 4 / 3)


def test_normalised_advantages():
    plain = rloo_advantages(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 4.0]]))
    got = rloo_advantages(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 4.0]]), normalize_advantages=True)
    torch.testing.assert_close(got, (plain - plain.mean()) / (plain.std() + 1e-4))
    assert rloo_advantages(torch.ones(2, 3), normalize_advantages=True).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("normalize", [False, True])
def test_an_answer_that_nothing_scored_is_left_out(normalize):
    got = rloo_advantages(torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, 7.0], [NAN] * 3]), normalize)
    scale = math.sqrt(8) + 1e-4 if normalize else 1.0  # of -2 and 2, the only two that can be compared
    torch.testing.assert_close(got, torch.tensor([[-2.0 / scale, 0, 2.0 / scale], [0, 0, 0], [0, 0, 0]]))


def test_nothing_to_compare_with_is_refused():
    with pytest.raises(ValueError, match="num_generations: got 1; RLOO compares at least 2"):
        rloo_advantages(torch.ones(4, 1))


def test_the_loss_of_whole_answers_is_the_surrogate_of_their_summed_log_probs():
    logps = torch.tensor([[-1.0, -0.5], [-2.0, -0.1]], requires_grad=True)
    old, advantages = torch.tensor([-1.45, -2.6]), torch.tensor([2.0, -1.0])
    result = policy_loss(logps.sum(1), old, advantages, cliprange=0.2)
    (gradient,) = torch.autograd.grad(result.loss.mean(), logps)
    ratio = math.exp(-0.05)
    torch.testing.assert_close(result.loss, torch.tensor([-2 * ratio, math.exp(0.5)]))
    torch.testing.assert_close(gradient, torch.tensor([[-ratio] * 2, [math.exp(0.5) / 2] * 2]))


# ---- REINFORCE++


def test_every_token_has_the_rewards_that_follow_it_whitened_over_the_batch():
    got = reinforce_plus_plus_advantages(KL, SCORES, LENGTHS, kl_coef=0.1)
    following = [1 - 0.15, 1 - 0.1, 0 - 0.2, 3 - 0.02, 3 - 0.01, 3 - 0.03, 2 - 0.2, 2 - 0.1]
    torch.testing.assert_close(got[MASK], torch.tensor(whitened(following)))
    assert not got[~MASK].any()


def test_following_rewards_are_discounted():
    got = reinforce_plus_plus_advantages(KL, SCORES, LENGTHS, kl_coef=0.0, gamma=0.5)
    torch.testing.assert_close(got[MASK], torch.tensor(whitened([0.5, 1, 0, 0.75, 1.5, 3, 1, 2])))


def test_the_baseline_variant_compares_with_the_mean_of_the_prompts_answers():
    groups = torch.tensor([0, 0, 1, 1])
    got = reinforce_plus_plus_advantages(KL, SCORES, LENGTHS, kl_coef=0.0, groups=groups)
    torch.testing.assert_close(got[MASK], torch.tensor(whitened([0.5, 0.5, -0.5, 0.5, 0.5, 0.5, -0.5, -0.5])))
    easier = SCORES + torch.tensor([0.0, 0.0, 5.0, 5.0])  # a prompt whose answers all score higher
    torch.testing.assert_close(reinforce_plus_plus_advantages(KL, easier, LENGTHS, kl_coef=0.0, groups=groups), got)


def test_the_baseline_leaves_the_divergence_to_the_tokens():
    got = reinforce_plus_plus_advantages(KL, SCORES, LENGTHS, kl_coef=0.1, groups=torch.tensor([0, 0, 1, 1]))
    following = [0.5 - 0.15, 0.5 - 0.1, -0.5 - 0.2, 0.5 - 0.02, 0.5 - 0.01, 0.5 - 0.03, -0.5 - 0.2, -0.5 - 0.1]
    torch.testing.assert_close(got[MASK], torch.tensor(whitened(following)))


def test_groups_may_have_lost_answers_and_stand_in_any_order():
    """An answer that nothing scored is left out before; the last one of its group has nothing to compare with."""
    got = less_group_mean(torch.tensor([1.0, 5.0, 2.0, 9.0, 6.0]), torch.tensor([4, 0, 4, 2, 4]))
    assert got.tolist() == [1 - 3, 0, 2 - 3, 0, 6 - 3]


@pytest.mark.parametrize("size", [3, 6, 7])
def test_equal_rewards_teach_exactly_nothing(size):
    """Whatever their sum rounds to: whitened or divided by Adam, the rounding would become an update."""
    rewards = torch.tensor([[0.1], [0.7], [123.4], [1e-3]]).expand(4, size)
    groups = torch.arange(4).repeat_interleave(size)
    assert not less_group_mean(rewards.flatten(), groups).any()
    for normalize in (False, True):
        assert not rloo_advantages(rewards, normalize).any()


def test_a_group_for_every_score():
    with pytest.raises(ValueError, match="groups: got 3 for 4 scores"):
        reinforce_plus_plus_advantages(KL, SCORES, LENGTHS, 0.0, groups=torch.tensor([0, 0, 1]))
