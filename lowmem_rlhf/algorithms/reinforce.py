"""RLOO and REINFORCE++: advantages without a critic. Their loss is `ppo.policy_loss`.

RLOO (Ahmadian et al. 2024, arXiv 2402.14740) takes an answer as one action and compares it with the other answers to
the same prompt. REINFORCE++ (Hu 2025, arXiv 2501.03262) sums up the rewards that follow each token and normalises over
the whole batch; its baseline variant first takes the mean score of the prompt's answers away.

Shapes: B prompts, G completions a prompt, N = B * G, L tokens of the longest one.
"""

import torch

from lowmem_rlhf.algorithms.padded import token_mask, whiten, zero_padding
from lowmem_rlhf.algorithms.ppo import gae
from lowmem_rlhf.algorithms.shaping import token_rewards


def sequence_rewards(scores: torch.Tensor, kl: torch.Tensor, lengths: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Return (N,) ``score - kl_coef * sum of kl``, the reward of an answer taken as one action.

    Args:
        scores: (N,); NaN marks an answer that no reward function scored, and stays.
        kl: (N, L) estimates, nats (RLOO: k1).
        lengths: (N,) real tokens.
        kl_coef: reward for each nat.

    Raises:
        ValueError: a length outside 1..L.
    """
    return scores - kl_coef * zero_padding(kl, token_mask(lengths, kl.shape[1])).sum(1)


def rloo_advantages(rewards: torch.Tensor, normalize_advantages: bool = False) -> torch.Tensor:
    """Return advantages (B, G): each reward less the mean of the group's other rewards.

    Args:
        rewards: (B, G) from `sequence_rewards`; NaN is left out of the means. Its advantage is 0, and so is that of a
            reward that is the only one of its group.
        normalize_advantages: less their mean over their unbiased deviation plus 1e-4, over the batch (TRL's option).

    Raises:
        ValueError: G is less than 2, so that there is nothing to compare with.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"num_generations: got {rewards.shape[1]}; RLOO compares at least 2 completions of a prompt")
    count = (~rewards.isnan()).sum(1, keepdim=True)
    exact = rewards.double()  # equal rewards have advantages of exactly 0, which Adam would make whole steps of else
    others = (exact.nansum(1, keepdim=True) - exact) / (count - 1)  # 0 / 0 for the only one of its group
    advantages = (exact - others).to(rewards.dtype)
    if normalize_advantages:
        known = advantages[~advantages.isnan()]
        deviation = known.std() if len(known) > 1 else known.new_zeros(())
        advantages = (advantages - known.mean()) / (deviation + 1e-4)
    return advantages.nan_to_num(nan=0.0)


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
