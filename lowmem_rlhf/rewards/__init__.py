"""Rewards: shipped functions, the user's own, learned ones, and how a batch of completions is scored."""

from lowmem_rlhf.rewards.loading import Reward, check_reward_columns, load_rewards, placements
from lowmem_rlhf.rewards.scoring import score
from lowmem_rlhf.rollout.scores import Scores

__all__ = ["Reward", "Scores", "check_reward_columns", "load_rewards", "placements", "score"]
