"""REINFORCE++ (Hu 2025, arXiv 2501.03262): advantages without a critic. Its loss is `ppo.math.policy_loss`.

It sums up the rewards that follow each token and normalises over the whole batch; its baseline variant first takes the
mean score of the prompt's answers away.

Shapes: N completions, L tokens of the longest one.
"""

import torch

from lowmem_rlhf.algorithms.common.gae import gae
from lowmem_rlhf.algorithms.common.padded import token_mask, whiten
from lowmem_rlhf.algorithms.common.shaping import token_rewards


def less_group_mean(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return scores (N,) less the mean score of their group; that of the only one of a group becomes 0.

    Args:
        scores: (N,) finite.
        groups: (N,) number of the prompt that each completion answers; in any order, and of any sizes.

    Raises:
        ValueError: there are not as many groups named as scores.
    """
    if groups.shape != scores.shape:
        raise ValueError(f"groups: got {len(groups)} for {len(scores)} scores; each completion has one")
    exact = scores.double()  # see `rloo_advantages`
    none = exact.new_zeros(int(groups.max()) + 1)
    means = none.index_add(0, groups, exact) / none.index_add(0, groups, torch.ones_like(exact))
    return (exact - means.index_select(0, groups)).to(scores.dtype)


def reinforce_plus_plus_advantages(
    kl: torch.Tensor,
    scores: torch.Tensor,
    lengths: torch.Tensor,
    kl_coef: float,
    gamma: float = 1.0,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return advantages (N, L): for each token the sum of its and the following rewards, whitened over the batch.

    Args:
        kl: (N, L) estimates, nats.
        scores: (N,) finite, on the last real token.
        lengths: (N,) real tokens.
        kl_coef: reward for each nat; the baseline variant usually has 0 here and a KL term in its loss.
        gamma: discount a token.
        groups: (N,) prompts, for the variant REINFORCE++-baseline; see `less_group_mean`.

    Raises:
        ValueError: a length outside 1..L, or not one group a score.
    """
    if groups is not None:
        scores = less_group_mean(scores, groups)
    rewards = token_rewards(kl, scores, lengths, kl_coef)
    following, _ = gae(rewards, torch.zeros_like(rewards), lengths, gamma, lam=1.0)
    return whiten(following, token_mask(lengths, kl.shape[1]))
