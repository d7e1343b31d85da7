"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): advantages without a critic. Its loss is `ppo.math.policy_loss`.

An answer is taken as one action and compared with the other answers to the same prompt.

Shapes: B prompts, G completions a prompt, N = B * G, L tokens of the longest one.
"""

import torch

from lowmem_rlhf.algorithms.common.padded import token_mask, zero_padding


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
