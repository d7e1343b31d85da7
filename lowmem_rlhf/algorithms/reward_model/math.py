"""Preference learning: the mathematics alone, on scores."""

import torch
import torch.nn.functional as F


def pair_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor, center_rewards_coefficient: float | None = None
) -> torch.Tensor:
    """Return ``-log sigmoid(chosen - rejected - margin)`` of each pair, plus ``c (chosen + rejected)^2``.

    Bradley-Terry as in InstructGPT (arXiv 2203.02155), the margin of Llama 2 (arXiv 2307.09288), and the centring of
    Eisenstein et al. (arXiv 2312.09244), which keeps the scores' mean near zero. TRL's RewardTrainer computes the same.

    Args:
        chosen, rejected: (P,) scores of the better and the worse answer, fp32.
        margin: (P,) how much better the better one is; zeros for none.
        center_rewards_coefficient: c; None: no centring.
    """
    loss = -F.logsigmoid(chosen - rejected - margin)
    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * (chosen + rejected).square()
    return loss
