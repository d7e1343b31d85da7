"""What an answer's score becomes before anything learns from it: one reward for each token.

Scores first: normalised, clipped, and lowered where an answer did not end (`shape_scores`). Then rewards: a KL penalty
on every token and the score on the last (`token_rewards`; Ziegler et al. 2019, arXiv 1909.08593).

Shapes: N completions, L tokens of the longest one.
"""

import math
from dataclasses import asdict, dataclass

import torch

from lowmem_rlhf.algorithms.common.padded import token_mask, zero_padding


@dataclass
class RunningMoments:
    """Mean and deviation of all scores seen so far, merged batch by batch (Chan et al. 1979; as in trlX and old TRL).

    Attributes:
        count: scores seen.
        mean: of them.
        m2: sum of their squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, scores: torch.Tensor) -> None:
        """Take in a batch's scores (N,)."""
        values = scores.detach().double().flatten()
        count, mean = len(values), float(values.mean())
        delta, total = mean - self.mean, self.count + count
        self.m2 += float((values - mean).square().sum()) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased deviation; 0 for fewer than two scores."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps, as JSON has it."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's state."""
        self.count, self.mean, self.m2 = int(state["count"]), float(state["mean"]), float(state["m2"])


def normalize_scores(scores: torch.Tensor, how: str, moments: RunningMoments | None = None) -> torch.Tensor:
    """Return scores less a mean over a standard deviation (plus 1e-4).

    Args:
        scores: (N,) fp32.
        how: ``none`` (as they are), ``batch`` (mean and unbiased deviation of this batch) or ``running`` (of all
            scores so far, this batch included).
        moments: for ``running``; takes in the batch.

    Raises:
        ValueError: another name, or ``running`` without moments.
    """
    if how == "none":
        return scores
    if how == "batch":
        moments = RunningMoments()
    elif how != "running":
        raise ValueError(f"normalize_scores: got {how!r}; allowed are none, batch and running")
    if moments is None:
        raise ValueError("normalize_scores: 'running' needs the moments of the scores so far")
    moments.update(scores)
    return (scores - moments.mean) / (moments.std + 1e-4)


def shape_scores(
    scores: torch.Tensor,
    truncated: torch.Tensor,
    *,
    normalize: str = "none",
    moments: RunningMoments | None = None,
    cliprange_reward: float | None = None,
    missing_eos_penalty: float | None = None,
) -> torch.Tensor:
    """Return scores normalised, then clipped, then less a penalty for answers that did not end.

    In this order the penalty keeps its size, whatever the scale of the scores. Without normalisation and clipping
    this is TRL's penalty.

    Args:
        scores: (N,) fp32.
        truncated: (N,) bool, True where the token limit ended the answer and not EOS.
        normalize, moments: see `normalize_scores`.
        cliprange_reward: scores stay within plus and minus this (trlX's name); None: no clipping.
        missing_eos_penalty: subtracted, so a positive number; None: none.

    Raises:
        ValueError: a score is not finite, the clip range is not positive, or the penalty is negative.
    """
    if bad := int((~scores.isfinite()).sum()):
        raise ValueError(f"scores: {bad} of {len(scores)} are not finite; leave completions without a score out")
    if cliprange_reward is not None and cliprange_reward <= 0:
        raise ValueError(f"cliprange_reward: got {cliprange_reward}; it must be above 0")
    if missing_eos_penalty is not None and missing_eos_penalty < 0:
        raise ValueError(f"missing_eos_penalty: got {missing_eos_penalty}; it is subtracted, so it must not be below 0")
    scores = normalize_scores(scores, normalize, moments)
    if cliprange_reward is not None:
        scores = scores.clamp(-cliprange_reward, cliprange_reward)
    return scores - (missing_eos_penalty or 0.0) * truncated


def reward_lengths(lengths: torch.Tensor, width: int, score_position: str = "last") -> torch.Tensor:
    """Return (N,) how many positions of each row have a reward and a value; the score is on the last of them.

    Args:
        lengths: (N,) real tokens.
        width: L.
        score_position: ``last``, the last real token (EOS, or where the answer was cut); or ``after_last``, one slot
            later where the batch has one, as TRL's PPO up to 1.12 did. That slot is the first padding: its value is
            the critic's after the last token, and it takes part in the value loss and in the whitening of rewards.

    Raises:
        ValueError: another name.
    """
    if score_position == "last":
        return lengths
    if score_position == "after_last":
        return (lengths + 1).clamp(max=width)
    raise ValueError(f"score_position: got {score_position!r}; allowed are last and after_last")


def token_rewards(
    kl: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor, kl_coef: float, score_position: str = "last"
) -> torch.Tensor:
    """Return the reward of each token (N, L): ``-kl_coef * kl``, plus the score on the last; zeros on the padding.

    Args:
        kl: (N, L) estimates of the divergence from the reference, nats.
        scores: (N,) of the answers.
        lengths: (N,) real tokens.
        kl_coef: reward for each nat.
        score_position: see `reward_lengths`.

    Raises:
        ValueError: a length outside 1..L, or an unknown position.
    """
    rewards = zero_padding(-kl_coef * kl, token_mask(lengths, kl.shape[1]))
    last = reward_lengths(lengths, kl.shape[1], score_position) - 1
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))
