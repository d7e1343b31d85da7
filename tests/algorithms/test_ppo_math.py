"""PPO's numbers, against numbers worked out by hand and against the definitions written out as loops."""

import math

import pytest
import torch

from lowmem_rlhf.algorithms.common.gae import gae
from lowmem_rlhf.algorithms.common.padded import pad_rows, token_mask, unpad_rows, whiten
from lowmem_rlhf.algorithms.ppo.math import explained_variance, policy_loss, ppo_advantages, value_loss
from lowmem_rlhf.algorithms.ppo.stats import PPOStatistics

NAN = float("nan")
LENGTHS = torch.tensor([6, 1, 4, 3])
MASK = token_mask(LENGTHS, 6)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- completions of unequal length


def test_rows_are_padded_with_zeros_and_come_back():
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])]
    matrix, lengths = pad_rows(rows)
    assert matrix.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert lengths.tolist() == [2, 1, 3]
    assert [row.tolist() for row in unpad_rows(matrix, lengths)] == [row.tolist() for row in rows]
    with pytest.raises(ValueError, match="got no rows"):
        pad_rows([])


def test_a_length_outside_the_batch_is_refused():
    assert token_mask(torch.tensor([1, 3]), 3).tolist() == [[True, False, False], [True, True, True]]
    with pytest.raises(ValueError, match=r"got \[0, 4\] tokens; allowed are 1 to 3"):
        token_mask(torch.tensor([0, 2, 4]), 3)


def test_whitening_is_over_all_real_tokens_with_the_unbiased_variance():
    x = torch.tensor([[1.0, 3.0], [8.0, NAN]])  # mean 4, squares 9 + 1 + 16 = 26, over 2
    mask = torch.tensor([[True, True], [True, False]])
    scale = 1 / math.sqrt(13)
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-3 * scale, -scale], [4 * scale, 0.0]]))
    kept = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept, torch.tensor([[4 - 3 * scale, 4 - scale], [4 + 4 * scale, 0.0]]))


def test_differences_too_small_to_matter_are_not_blown_up():
    whitened = whiten(torch.tensor([[-1e-5, 1e-5]]), torch.ones(1, 2, dtype=torch.bool))  # variance 2e-10
    torch.testing.assert_close(whitened[0, 1].item(), 1e-5 / math.sqrt(2e-10 + 1e-8), rtol=1e-4, atol=0)


def test_what_does_not_vary_is_whitened_to_zero():
    assert whiten(torch.full((2, 2), 0.5), torch.ones(2, 2, dtype=torch.bool)).tolist() == [[0, 0], [0, 0]]
    assert whiten(torch.tensor([[7.0, NAN]]), torch.tensor([[True, False]])).tolist() == [[0, 0]]


# ---- generalised advantage estimation


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.1, -0.2, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]])
    advantages, returns = gae(rewards, values, torch.tensor([3]), gamma=0.9, lam=0.5)
    third = 1.0 - 0.2
    second = -0.2 + 0.9 * 0.2 - 0.4 + 0.45 * third
    first = 0.1 + 0.9 * 0.4 - 0.5 + 0.45 * second
    torch.testing.assert_close(advantages, torch.tensor([[first, second, third]]))
    torch.testing.assert_close(returns, torch.tensor([[first + 0.5, second + 0.4, third + 0.2]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.3), (1.0, 1.0), (0.97, 0.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_gae_is_the_discounted_sum_of_the_errors_that_follow(gamma, lam, bootstrapped):
    rewards, values = random(4, 6), random(4, 6, seed=1)
    bootstrap = torch.tensor([0.7, 0.0, -1.1, 0.0]) if bootstrapped else None
    advantages, returns = gae(rewards.where(MASK, NAN), values.where(MASK, NAN), LENGTHS, gamma, lam, bootstrap)
    for n, length in enumerate(LENGTHS.tolist()):
        following = [*values[n, :length].tolist(), float(bootstrap[n]) if bootstrapped else 0.0]
        errors = [float(rewards[n, t]) + gamma * following[t + 1] - following[t] for t in range(length)]
        for t in range(length):
            want = sum((gamma * lam) ** (i - t) * errors[i] for i in range(t, length))
            assert advantages[n, t].item() == pytest.approx(want, abs=1e-5)
            assert returns[n, t].item() == pytest.approx(want + following[t], abs=1e-5)
        assert not advantages[n, length:].any()
        assert not returns[n, length:].any()


def test_with_lambda_one_returns_are_monte_carlo_whatever_the_critic_says():
    rewards = random(4, 6) * MASK
    _, returns = gae(rewards, random(4, 6, seed=1), LENGTHS, gamma=0.9, lam=1.0)
    for n, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            want = sum(0.9 ** (i - t) * float(rewards[n, i]) for i in range(t, length))
            assert returns[n, t].item() == pytest.approx(want, abs=1e-5)


def test_with_lambda_zero_only_the_next_value_counts():
    rewards, values = random(1, 3), random(1, 3, seed=1)
    _, returns = gae(rewards, values, torch.tensor([3]), gamma=0.9, lam=0.0)
    torch.testing.assert_close(returns[0, :2], rewards[0, :2] + 0.9 * values[0, 1:])
    torch.testing.assert_close(returns[0, 2], rewards[0, 2])


# ---- a whole rollout


def rollout(width: int = 6, **changes):
    """Return the advantages of a ragged rollout, whose padding is NaN, in a batch of this width."""
    inputs = [torch.full((4, width), NAN) for _ in range(3)]
    for seed, x in enumerate(inputs):
        x[:, :6] = random(4, 6, seed=seed).where(MASK, NAN)
    scores = torch.tensor([1.0, -0.5, 2.0, 0.25])
    return inputs, scores, ppo_advantages(*inputs, scores, LENGTHS, **{"kl_coef": 0.1, **changes})


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("score_position", ["last", "after_last"])
def test_padding_never_matters(kl_estimator, whiten_rewards, score_position):
    settings = {"kl_estimator": kl_estimator, "whiten_rewards": whiten_rewards, "score_position": score_position}
    inputs, scores, _ = rollout(9)
    shown = token_mask(LENGTHS + (score_position == "after_last"), 9)  # there the critic has one more value
    one, other = (
        ppo_advantages(
            *(x.where(token_mask(LENGTHS, 9), junk) for x in inputs[:2]),
            inputs[2].nan_to_num(0.3).where(shown, junk),
            scores,
            LENGTHS,
            kl_coef=0.1,
            **settings,
        )
        for junk in (NAN, -55.0)
    )
    for name in ("kl", "rewards", "advantages", "returns"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert not getattr(one, name)[~shown].any(), name
    assert one.advantages[token_mask(LENGTHS, 9)].abs().min() > 1e-4


def test_a_wider_batch_changes_nothing():
    *_, narrow = rollout(6, whiten_rewards=True)
    *_, wide = rollout(11, whiten_rewards=True)
    for name in ("kl", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(wide, name)[:, :6], getattr(narrow, name), msg=name)


def test_returns_are_from_advantages_before_whitening_and_advantages_after():
    (_, _, values), _, got = rollout(lam=0.9)
    raw, returns = gae(got.rewards, values, LENGTHS, 1.0, 0.9)
    assert torch.equal(got.returns, returns)
    torch.testing.assert_close(got.advantages, whiten(raw, MASK))
    assert got.advantages[MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert got.advantages[MASK].std().item() == pytest.approx(1, abs=1e-4)


def test_whitened_rewards_keep_their_mean_and_have_deviation_one():
    plain, scaled = rollout()[2].rewards[MASK], rollout(whiten_rewards=True)[2].rewards[MASK]
    assert scaled.mean().item() == pytest.approx(plain.mean().item(), abs=1e-6)
    assert scaled.std().item() == pytest.approx(1, abs=1e-4)
    assert plain.std().item() < 0.9


def test_a_bootstrap_is_the_value_behind_the_last_token():
    bootstrap = torch.tensor([0.5, 0.0, 0.0, 0.0])
    *_, without = rollout(gamma=0.9, lam=0.8)
    *_, got = rollout(gamma=0.9, lam=0.8, bootstrap=bootstrap)
    more = (got.returns - without.returns)[0]
    torch.testing.assert_close(more, torch.tensor([0.9 * 0.5 * 0.72 ** (5 - t) for t in range(6)]))
    assert torch.equal(got.returns[1:], without.returns[1:])
    assert torch.equal(got.rewards, without.rewards)
    with pytest.raises(ValueError, match="'after_last' has that value in the values"):
        rollout(bootstrap=bootstrap, score_position="after_last")


# ---- losses


# ratio, advantage, loss, gradient with respect to the log-prob, clipped (range 0.8 to 1.2)
POLICY = [
    (1.0, 2.0, -2.0, -2.0, 0),
    (1.0, -2.0, 2.0, 2.0, 0),
    (1.5, 1.0, -1.2, 0.0, 1),
    (1.5, -1.0, 1.5, 1.5, 0),  # the worse of the two: not clipped
    (0.5, 1.0, -0.5, -0.5, 0),
    (0.5, -1.0, 0.8, 0.0, 1),
    (1.5, 0.0, 0.0, 0.0, 0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "clipped"), POLICY)
def test_the_clipped_surrogate(ratio, advantage, loss, gradient, clipped):
    logps = torch.tensor([-1.0], requires_grad=True)
    result = policy_loss(logps, logps.detach() - math.log(ratio), torch.tensor([advantage]), 0.2)
    (got,) = torch.autograd.grad(result.loss.sum(), logps)
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)
    assert got.item() == pytest.approx(gradient, abs=1e-6)
    assert result.clipped.item() == clipped
    assert result.ratio.item() == pytest.approx(ratio)
    assert result.approx_kl.item() == pytest.approx(0.5 * math.log(ratio) ** 2, abs=1e-7)
    assert result.approx_kl_k3.item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)
    assert not any(x.requires_grad for x in (result.ratio, result.clipped, result.approx_kl, result.approx_kl_k3))


# value, old value, return, loss, gradient, clipped (range 0.2)
VALUE = [
    (0.5, 0.5, 1.0, 0.125, -0.5, 0),
    (0.6, 0.5, 1.0, 0.08, -0.4, 0),
    (0.9, 0.5, 1.0, 0.045, 0.0, 1),  # moved too far towards the return: no more gradient
    (0.9, 0.5, 0.0, 0.405, 0.9, 0),  # moved too far from it: the whole error
    (0.1, 0.5, -1.0, 0.845, 0.0, 1),
]


@pytest.mark.parametrize(("value", "old", "target", "loss", "gradient", "clipped"), VALUE)
def test_the_clipped_value_loss(value, old, target, loss, gradient, clipped):
    values = torch.tensor([value], requires_grad=True)
    result = value_loss(values, torch.tensor([old]), torch.tensor([target]), 0.2)
    (got,) = torch.autograd.grad(result.loss.sum(), values)
    assert result.loss.item() == pytest.approx(loss)
    assert got.item() == pytest.approx(gradient, abs=1e-6)
    assert result.clipped.item() == clipped


def test_without_a_range_the_value_loss_is_half_the_squared_error():
    values = torch.tensor([0.9, 0.1], requires_grad=True)
    result = value_loss(values, torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]), None)
    (got,) = torch.autograd.grad(result.loss.sum(), values)
    torch.testing.assert_close(result.loss, torch.tensor([0.005, 0.605]))
    torch.testing.assert_close(got, torch.tensor([-0.1, 1.1]))
    assert result.clipped.tolist() == [0, 0]


def mini_batch(parts: list[int]):
    """Return loss, gradients and metrics of 20 tokens, in micro-batches of these sizes."""
    logps = (random(20) * 0.3).requires_grad_()
    values = random(20, seed=1).requires_grad_()
    old_values, returns = values.detach() + random(20, seed=2) * 0.3, random(20, seed=3)
    stats, total = PPOStatistics(), 0.0
    inputs = [logps, torch.zeros(20), random(20, seed=4), values, old_values, returns]
    for lp, old_lp, advantages, v, old_v, target in zip(*(x.split(parts) for x in inputs), strict=True):
        policy, value = policy_loss(lp, old_lp, advantages, 0.2), value_loss(v, old_v, target, 0.2)
        loss = policy.loss.sum() / 20 + 0.1 * value.loss.sum() / 20
        loss.backward()
        total += loss.item()
        stats.add(policy, value)
    return total, logps.grad, values.grad, stats.metrics()


@pytest.mark.parametrize("parts", [[10, 10], [1, 2, 17], [1] * 20])
def test_a_split_into_micro_batches_changes_neither_loss_nor_gradient_nor_metrics(parts):
    loss, logps_grad, values_grad, metrics = mini_batch([20])
    split_loss, split_logps_grad, split_values_grad, split_metrics = mini_batch(parts)
    assert split_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(split_logps_grad, logps_grad)
    torch.testing.assert_close(split_values_grad, values_grad)
    assert split_metrics == pytest.approx(metrics, abs=1e-6)
    assert 0.1 < metrics["policy/clip_fraction"] < 0.9
    assert 0.1 < metrics["value/clip_fraction"] < 0.9


# ---- statistics


def test_statistics_by_hand():
    policy = policy_loss(
        torch.tensor([0.0, 0.0]), -torch.tensor([0.5, 2.0]).log(), torch.tensor([2.0, 1.0]), cliprange=0.2
    )
    value = value_loss(torch.tensor([0.9, 0.0, 1.0]), torch.tensor([0.5, 0.0, 1.0]), torch.ones(3), 0.2)
    stats = PPOStatistics()
    assert stats.metrics() == {}
    stats.add(policy, value)
    assert stats.metrics() == pytest.approx(
        {
            "policy/loss": (-2 * 0.5 - 1.2) / 2,
            "policy/approx_kl": math.log(2) ** 2 / 2,
            "policy/approx_kl_k3": 0.25,
            "policy/clip_fraction": 0.5,
            "policy/ratio_mean": 1.25,
            "policy/ratio_std": 0.75,
            "policy/ratio_min": 0.5,
            "policy/ratio_max": 2.0,
            "value/loss": (0.045 + 0.5) / 3,
            "value/clip_fraction": 1 / 3,
        }
    )


def test_without_a_critic_there_are_no_metrics_of_one():
    stats = PPOStatistics()
    stats.add(policy_loss(torch.zeros(3), torch.zeros(3), torch.ones(3), 0.2))
    assert (stats.tokens, stats.value_tokens) == (3, 0)
    assert all(name.startswith("policy/") for name in stats.metrics())


def test_on_the_policy_ratio_is_one_and_every_divergence_zero():
    logps = random(50) - 3
    stats = PPOStatistics()
    stats.add(policy_loss(logps, logps.clone(), random(50, seed=1), 0.2))
    metrics = stats.metrics()
    ratios = [metrics[f"policy/ratio_{name}"] for name in ("mean", "min", "max", "std")]
    assert ratios == [1, 1, 1, 0]
    assert metrics["policy/approx_kl"] == metrics["policy/approx_kl_k3"] == metrics["policy/clip_fraction"] == 0


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])  # variance 14 / 4
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 5, returns) == 1  # a constant error explains the differences all the same
    assert explained_variance(torch.full((4,), 3.0), returns) == 0
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0, 4.0]), returns) == pytest.approx(1 - 0.75 / 3.5)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(torch.tensor([1.0, 2.0]), torch.ones(2)) is None
    assert explained_variance(torch.ones(0), torch.ones(0)) is None
