"""GRPO: the mathematics alone, on numbers and vectors, without a model.

Group-relative advantages (DeepSeekMath, arXiv 2402.03300), the surrogates of a policy's ratio to the one that sampled,
the k3 estimate of the KL divergence, and bounded importance weights for the difference between sampling and training
pass (TIS, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", Yao et al. 2025). `losses`
normalises them. Names and numbers agree with TRL 1.16, which is the oracle in the tests.

Shapes: B prompts, G completions a prompt, N = B * G, S scored tokens of a micro-batch, R completions of it.
"""

import math
from collections.abc import Sequence

import torch

from lowmem_rlhf.algorithms.common.kl import k3


def group_advantages(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """Return advantages (B, G): each reward less its group's mean, over a standard deviation (plus 1e-4).

    Args:
        rewards: (B, G) fp32; NaN marks a completion that no reward function scored, its advantage is 0 and it is
            left out of mean and deviation.
        scale: ``group`` (deviation of the group), ``batch`` (of all rewards) or ``none``.
    """
    advantages = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (_nanstd(rewards, dim=1) + 1e-4)
    elif scale == "batch":
        advantages = advantages / (_nanstd(rewards.flatten(), dim=0) + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale_rewards: got {scale!r}; allowed are group, batch and none")
    return advantages.nan_to_num(nan=0.0)


def _nanstd(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Unbiased standard deviation without the NaNs, keeping the dimension; 0 where fewer than two values are left."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    squares = (x - x.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


@torch.no_grad()
def importance_weights(
    old_logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    lengths: Sequence[int],
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> torch.Tensor:
    """Return each token's weight (S,): its probability in the training pass over that while sampling, bounded.

    They are constants of the loss: no gradient flows through them.

    Args:
        old_logps: (S,) of the training pass, before the first update.
        sampling_logps: (S,) as the tokens were drawn.
        lengths: tokens of each completion, in order; they add up to S.
        mode: ``token_*``: each token's own ratio; ``sequence_*``: the product over its completion. ``*_truncate``:
            ratios are clamped to the bounds; ``*_mask``: outside of the bounds the weight is 0.
        clip_min, clip_max: the bounds; None: none.
    """
    level, _, bounding = mode.partition("_")
    if level not in ("token", "sequence") or bounding not in ("truncate", "mask"):
        allowed = "token_truncate, token_mask, sequence_truncate and sequence_mask"
        raise ValueError(f"importance_sampling_mode: got {mode!r}; allowed are {allowed}")
    difference = old_logps - sampling_logps
    if level == "sequence":
        difference = torch.cat([part.sum().expand(len(part)) for part in difference.split(list(lengths))])
    ratio = difference.exp()
    low, high = clip_min or 0.0, math.inf if clip_max is None else clip_max
    if bounding == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def sums_by_row(values: torch.Tensor, row_index: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the sum over each completion's tokens, for each of its tokens: (S,) of (S,); the host waits for nothing.

    Args:
        row_index: (S,) whole numbers below ``rows``, the place of each token's completion.
        rows: R.
    """
    sums = torch.zeros(rows, dtype=values.dtype, device=values.device).index_add(0, row_index, values)
    return sums.index_select(0, row_index)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> torch.Tensor:
    """Return ``-min(min(r, delta) A, clip(r, 1 - low, 1 + high) A)`` (S,): PPO's, with two bounds as in DAPO.

    Args:
        delta: bounds what a completion with a negative advantage weighs (INTELLECT-2, arXiv 2505.07291); None: nothing
            does, as in PPO.
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def truncated_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, logps: torch.Tensor, most: float
) -> torch.Tensor:
    """Return CISPO's ``-min(r, most) A logp`` (S,), the weight without a gradient (MiniMax-M1, arXiv 2506.13585)."""
    return -ratio.clamp(max=most).detach() * advantages * logps


def soft_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, temperature_pos: float, temperature_neg: float
) -> torch.Tensor:
    """Return SAPO's ``-4 / t sigmoid(t (r - 1)) A`` (S,) with t by the sign of A (arXiv 2511.20347)."""
    temperatures = _by_sign(advantages > 0, advantages, temperature_pos, temperature_neg)
    return -torch.sigmoid(temperatures * (ratio - 1)) * 4 / temperatures * advantages


def _by_sign(positive: torch.Tensor, advantages: torch.Tensor, yes: float, no: float) -> torch.Tensor:
    return torch.full_like(advantages, no).masked_fill(positive, yes)


# VESPO's bounds of a token's log-ratio and of a completion's, as in TRL
MOST_LOG_RATIO, LEAST_LOG_WEIGHT = 20.0, math.log(1e-8)


@torch.no_grad()
def gamma_weights(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    sampling_weights: torch.Tensor | None,
    row_index: torch.Tensor,
    rows: int,
    powers: tuple[float, float],
    decays: tuple[float, float],
) -> torch.Tensor:
    """Return VESPO's weight of each token (S,): ``phi(w) = e^l w^k e^(-l w)`` of its completion (arXiv 2602.10693).

    w is the product over the completion of the ratios to the policy that sampled; phi(1) = 1. No gradient flows through
    it.

    Args:
        log_ratio: (S,) of the policy to the one before the first update.
        sampling_weights: (S,) of that one to the sampler, by token (`importance_weights`); None: they are equal.
        row_index, rows: see `sums_by_row`.
        powers, decays: k and l, first for an advantage of 0 and above, then for one below.
    """
    log_w = sums_by_row(log_ratio.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO), row_index, rows)
    if sampling_weights is not None:
        log_w += sums_by_row(sampling_weights.log().clamp(LEAST_LOG_WEIGHT, MOST_LOG_RATIO), row_index, rows)
    log_w = log_w.clamp(LEAST_LOG_WEIGHT, MOST_LOG_RATIO)
    positive = advantages >= 0
    k, decay = _by_sign(positive, advantages, *powers), _by_sign(positive, advantages, *decays).clamp(min=1e-4)
    return (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@torch.no_grad()
def off_policy_mask(
    logps: torch.Tensor,
    sampling_logps: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor,
    row_index: torch.Tensor,
    rows: int,
    threshold: float,
) -> torch.Tensor:
    """Return whether each token's completion is learned from (S,): DeepSeek-V3.2's off-policy mask (arXiv 2512.02556).

    A completion is left out where its advantage is negative and the mean over its tokens of ``sampling - logp`` is
    above the threshold: what the policy has left behind says little about where it is.

    Args:
        logps: (S,) of the policy as it is.
        sampling_logps: (S,) as the tokens were drawn.
        lengths: (S,) tokens of each token's completion.
        row_index, rows: see `sums_by_row`.
        threshold: nats a token.
    """
    divergence = sums_by_row(sampling_logps - logps, row_index, rows) / lengths
    return (advantages >= 0) | (divergence <= threshold)


def kl_term(ratio: torch.Tensor, logps: torch.Tensor, ref_logps: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Return ``r * k3`` (S,), the divergence from the reference; not ``unbiased``: `k3` alone.

    The ratio r makes the gradient the unbiased one of the reverse KL, on the policy too, where r is 1 but not its
    gradient (DeepSeek-V3.2, arXiv 2512.02556; TRL's ``use_bias_correction_kl``).
    """
    divergence = k3(logps, ref_logps)
    return ratio * divergence if unbiased else divergence


@torch.no_grad()
def out_of_range(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each ratio (S,) is out of the clip range, below and above, where A would take it further out."""
    return (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)
