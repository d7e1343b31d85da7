"""RLOO as the online loop's algorithm: an answer is one action, compared with the others to the same prompt."""

from typing import Any

import torch

from lowmem_rlhf.algorithms.ppo.policy_gradient import PolicyGradient, ScoredRollout
from lowmem_rlhf.algorithms.ppo.update import Targets
from lowmem_rlhf.algorithms.rloo.math import rloo_advantages, sequence_rewards


class RLOO(PolicyGradient):
    """REINFORCE with a leave-one-out baseline."""

    def targets(self, scored: ScoredRollout) -> tuple[Targets, dict[str, Any]]:
        """See `PolicyGradient.targets`; a completion that no reward applies to leaves its group smaller."""
        rows, group = scored.rows, scored.rollout.num_generations
        groups = max(rows) // group + 1
        rewards = torch.full((groups * group,), float("nan"), dtype=torch.float32, device=scored.kl.device)
        rewards[list(rows)] = sequence_rewards(scored.scores, scored.kl, scored.padded[2], self.kl.value)
        advantages = rloo_advantages(rewards.view(groups, group), self.settings.normalize_advantages).flatten()
        return Targets(scored.logps, {row: advantages[row].view(1) for row in rows}, by_sequence=True), {}
