"""GRPO: the mathematics alone, on numbers and vectors, without a model.

Group-relative advantages (DeepSeekMath, arXiv 2402.03300), asymmetric clipping (DAPO, arXiv 2503.14476), the k3
estimate of the KL divergence, and bounded importance weights for the difference between sampling and training pass
(TIS, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", Yao et al. 2025). `losses` normalises
them. Names and numbers agree with TRL 1.16, which is the oracle in the tests.

Shapes: B prompts, G completions a prompt, N = B * G, S scored tokens of a micro-batch.
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


def token_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    ref_logps: torch.Tensor,
    beta: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the clipped surrogate ``-w min(r A, clip(r, 1 - low, 1 + high) A) + beta * r * k3`` for each token (S,).

    The ratio r makes the KL term's gradient the unbiased one of the reverse KL, on the policy too, where r is 1 but
    not its gradient (DeepSeek-V3.2, arXiv 2512.02556; TRL's ``use_bias_correction_kl``, its default).

    Args:
        logps: (S,) of the policy, differentiable.
        old_logps: (S,) of the policy that sampled; its own detached values in the first iteration.
        advantages: (S,) of each token's completion.
        ref_logps: (S,) of the reference; not read when beta is 0.
        beta: weight of the `k3` term.
        weights: (S,) w, see `importance_weights`; None: 1. They weigh the surrogate alone, as in TRL.
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if weights is not None:
        loss = loss * weights
    if beta:
        loss = loss + beta * (ratio * k3(logps, ref_logps))
    return loss


@torch.no_grad()
def measured_tokens(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    ref_logps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what is measured of each token, all (S,), whatever the loss; see `token_loss` for the arguments.

    Returns:
        The divergence from the reference (r * k3), and whether the token is outside of the clip range, below and above,
        where its advantage would take it further out.
    """
    ratio = (logps - old_logps).exp()
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return ratio * k3(logps, ref_logps), low, high
