"""Reward functions: the shipped ones, the user's own, and how a batch of completions is scored."""

from lowmem_rlhf.rewards.loading import Reward, check_reward_columns, load_rewards
from lowmem_rlhf.rewards.scoring import Scores, score

__all__ = ["Reward", "Scores", "check_reward_columns", "load_rewards", "score"]
