"""PPO: the mathematics alone, on numbers and vectors, without a model.

Proximal policy optimisation (arXiv 1707.06347) with generalised advantage estimation (arXiv 1506.02438), as language
models are trained with it (Ziegler et al. 2019, arXiv 1909.08593; "The N Implementation Details of RLHF with PPO").
Names and numbers agree with TRL 1.12.0, the last release with PPO, whose recorded update the tests reproduce. Where we
differ: the score is on the last real token (TRL's place is ``score_position="after_last"``), statistics are means over
real tokens (TRL counts the padding in ratio and approx_kl), and a loss has one normaliser for its whole mini-batch (TRL
averages the means of micro-batches, so that there the split changes the gradient).

Shapes: N completions, L tokens of the longest one, S scored tokens of a micro-batch.
"""

from dataclasses import dataclass

import torch

from lowmem_rlhf.algorithms.common.gae import gae
from lowmem_rlhf.algorithms.common.kl import k3, kl_estimate
from lowmem_rlhf.algorithms.common.padded import token_mask, whiten, zero_padding
from lowmem_rlhf.algorithms.common.shaping import reward_lengths, token_rewards


@dataclass(frozen=True)
class Advantages:
    """What a rollout teaches, all (N, L) with zeros on the padding, and the number of positions with a value.

    Attributes:
        kl: estimates of the divergence from the reference, nats.
        rewards: of the tokens, whitened if that was asked for.
        advantages: whitened over the batch.
        returns: what the critic should have said; from the advantages before their whitening.
        value_lengths: (N,) positions that the value loss is over; the lengths, unless the score is after the last.
    """

    kl: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    value_lengths: torch.Tensor


@torch.no_grad()
def ppo_advantages(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    lengths: torch.Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    bootstrap: torch.Tensor | None = None,
    score_position: str = "last",
) -> Advantages:
    """Return rewards, advantages and returns of a whole rollout batch.

    The batch must be whole, since rewards and advantages are whitened over it.

    Args:
        logps: (N, L) fp32 of the policy that sampled.
        ref_logps: (N, L) fp32 of the reference.
        values: (N, L) fp32 of the critic; with ``after_last`` also for the slot behind the last token.
        scores: (N,) from `shape_scores`.
        lengths: (N,) real tokens.
        kl_coef, kl_estimator: of the penalty in the rewards; see `token_rewards` and `kl_estimate`.
        gamma, lam, bootstrap: see `gae`.
        whiten_rewards: scale rewards to a deviation of 1 before the advantages are made of them; their mean stays.
        score_position: ``last``, or ``after_last`` for TRL's numbers; see `reward_lengths`.

    Raises:
        ValueError: a length outside 1..L, an unknown name, or a bootstrap together with ``after_last``, where the
            critic's value after the last token is in the values already.
    """
    width = logps.shape[1]
    mask = token_mask(lengths, width)
    value_lengths = reward_lengths(lengths, width, score_position)
    if bootstrap is not None and score_position != "last":
        raise ValueError("bootstrap: is for score_position 'last' only; 'after_last' has that value in the values")
    kl = zero_padding(kl_estimate(logps, ref_logps, kl_estimator), mask)
    rewards = token_rewards(kl, scores, lengths, kl_coef, score_position)
    if whiten_rewards:
        rewards = whiten(rewards, token_mask(value_lengths, width), shift_mean=False)
    advantages, returns = gae(rewards, values, value_lengths, gamma, lam, bootstrap)
    return Advantages(kl, rewards, whiten(advantages, mask), returns, value_lengths)


@dataclass(frozen=True)
class PolicyLoss:
    """Per-token results, all (S,); only the loss has a gradient.

    Attributes:
        loss: the clipped surrogate.
        ratio: of the policy's to the sampling policy's probability.
        clipped: 1 where the clipped term is the one that counts.
        approx_kl: half the squared difference of the log-probs (TRL's).
        approx_kl_k3: Schulman's k3 estimate of the divergence of the new from the sampling policy.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor
    approx_kl: torch.Tensor
    approx_kl_k3: torch.Tensor


def policy_loss(logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, cliprange: float) -> PolicyLoss:
    """Return ``max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange))`` for each token.

    A caller adds up ``loss / tokens``, with the tokens of the whole mini-batch, over micro-batches of any size. Given
    sums of log-probs and advantages of whole completions instead of tokens', it is RLOO's loss of TRL.

    Args:
        logps: (S,) of the policy, differentiable.
        old_logps: (S,) of the policy that sampled.
        advantages: (S,).
        cliprange: how far the ratio may go from 1 before it teaches nothing more.
    """
    difference = logps - old_logps
    ratio = difference.exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        indicator = (clipped > free).to(ratio.dtype)
        approx_kl = 0.5 * difference.square()
        approx_kl_k3 = k3(old_logps, logps)
    return PolicyLoss(torch.maximum(free, clipped), ratio.detach(), indicator, approx_kl, approx_kl_k3)


@dataclass(frozen=True)
class ValueLoss:
    """Per-token results, both (S,): the loss, which has a gradient, and 1 where the clipped term counts."""

    loss: torch.Tensor
    clipped: torch.Tensor


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange_value: float | None
) -> ValueLoss:
    """Return ``0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)`` for each token.

    To be normalised as `policy_loss` is, by the positions with a value.

    Args:
        values: (S,) of the critic, differentiable.
        old_values: (S,) of the critic when the rollout was scored.
        returns: (S,) of `ppo_advantages`.
        cliprange_value: c; None does not clip.
    """
    free = (values - returns).square()
    if cliprange_value is None:
        return ValueLoss(0.5 * free, torch.zeros_like(free))
    clipped = (values.clamp(old_values - cliprange_value, old_values + cliprange_value) - returns).square()
    return ValueLoss(0.5 * torch.maximum(free, clipped), (clipped > free).to(free.dtype))


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float | None:
    """Return ``1 - var(R - V) / var(R)``: 1 for a perfect critic, 0 for one that says the mean return everywhere.

    Args:
        values: (S,) of all real tokens of the rollout, before the update.
        returns: (S,).

    Returns:
        None where the returns do not vary (or there are none), so that nothing could be explained.
    """
    if not len(returns) or not (total := returns.double().var(correction=0)) > 0:
        return None
    return float(1 - (returns.double() - values.double()).var(correction=0) / total)
