"""REINFORCE++ as the online loop's algorithm: rewards to come, whitened over the batch."""

from typing import Any

import torch

from lowmem_rlhf.algorithms.common.padded import unpad_rows
from lowmem_rlhf.algorithms.ppo.policy_gradient import PolicyGradient, ScoredRollout
from lowmem_rlhf.algorithms.ppo.update import Targets
from lowmem_rlhf.algorithms.reinforce_plus_plus.math import reinforce_plus_plus_advantages


class ReinforcePlusPlus(PolicyGradient):
    """REINFORCE++, or its variant with the group's mean as the baseline."""

    def targets(self, scored: ScoredRollout) -> tuple[Targets, dict[str, Any]]:
        """See `PolicyGradient.targets`; a completion that no reward applies to leaves its group smaller."""
        settings, rows, lengths = self.settings, scored.rows, scored.padded[2]
        prompts = [row // scored.rollout.num_generations for row in rows]
        groups = torch.tensor(prompts, dtype=torch.long, device=scored.kl.device) if settings.group_baseline else None
        advantages = reinforce_plus_plus_advantages(
            scored.kl, scored.scores, lengths, self.kl.value, settings.gamma, groups
        )
        return Targets(scored.logps, dict(zip(rows, unpad_rows(advantages, lengths), strict=True))), {}
