"""GRPO: the mathematics alone, on numbers and vectors, without a model.

Group-relative advantages (DeepSeekMath, arXiv 2402.03300), the loss normalisations of GRPO, BNPO, Dr. GRPO
(arXiv 2503.20783) and DAPO (arXiv 2503.14476), asymmetric clipping (DAPO) and the k3 estimate of the KL divergence.
Names and numbers agree with TRL 1.16, which is the oracle in the tests.

Shapes: B prompts, G completions a prompt, N = B * G, S scored tokens of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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


def token_weights(lengths: Sequence[int], counted: Sequence[bool], loss_type: str, max_length: int) -> list[float]:
    """Return for each completion the weight of one of its tokens in the loss: the loss is the weighted sum.

    The weights are those of the whole batch, so any split into micro-batches adds up to the same loss.

    Args:
        lengths: tokens of each of the N completions.
        counted: whether the completion takes part (False: truncated and masked).
        loss_type: ``grpo`` (mean over a completion, then over completions), ``bnpo`` and ``dapo`` (mean over all
            tokens; TRL's differ only in which batch that is), ``dr_grpo`` (sum over N * max_length).
        max_length: the limit on completion tokens, for ``dr_grpo``.
    """
    count = len(lengths)
    total = max(sum(n for n, c in zip(lengths, counted, strict=True) if c), 1)
    if loss_type == "grpo":
        weights = [1.0 / (count * n) for n in lengths]
    elif loss_type in ("bnpo", "dapo"):
        weights = [1.0 / total] * count
    elif loss_type == "dr_grpo":
        weights = [1.0 / (count * max_length)] * count
    else:
        raise ValueError(f"loss_type: got {loss_type!r}; allowed are grpo, bnpo, dr_grpo and dapo")
    return [w if c else 0.0 for w, c in zip(weights, counted, strict=True)]


@dataclass(frozen=True)
class TokenLoss:
    """Per-token results, all (S,): the loss, the divergence from the reference (r * k3), and clip indicators."""

    loss: torch.Tensor
    kl: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def k3(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """Return ``exp(ref - logp) - (ref - logp) - 1`` for each token (Schulman, "Approximating KL divergence")."""
    difference = ref_logps - logps
    return difference.exp() - difference - 1


def token_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    ref_logps: torch.Tensor,
    beta: float,
) -> TokenLoss:
    """Return the clipped surrogate ``-min(r A, clip(r, 1 - low, 1 + high) A) + beta * r * k3`` for each token.

    The ratio r makes the KL term's gradient the unbiased one of the reverse KL, on the policy too, where r is 1 but
    not its gradient (DeepSeek-V3.2, arXiv 2512.02556; TRL's ``use_bias_correction_kl``, its default).

    Args:
        logps: (S,) of the policy, differentiable.
        old_logps: (S,) of the policy that sampled; its own detached values in the first iteration.
        advantages: (S,) of each token's completion.
        ref_logps: (S,) of the reference; only measured when beta is 0.
        beta: weight of the `k3` term.
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    kl = ratio * k3(logps, ref_logps)
    if beta:
        loss = loss + beta * kl
    with torch.no_grad():
        low = (ratio < 1 - epsilon_low) & (advantages < 0)
        high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return TokenLoss(loss, kl.detach(), low, high)
