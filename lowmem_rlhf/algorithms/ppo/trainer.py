"""PPO as the online loop's algorithm: a critic on the shared base, and advantages by GAE.

Shapes: M completions that a reward applies to, L tokens of the longest one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lowmem_rlhf.algorithms.common.padded import pad_rows, token_mask, unpad_rows, zero_padding
from lowmem_rlhf.algorithms.common.shaping import RunningMoments
from lowmem_rlhf.algorithms.ppo.math import Advantages, explained_variance, ppo_advantages
from lowmem_rlhf.algorithms.ppo.policy_gradient import CriticValues, PolicyGradient, ScoredRollout
from lowmem_rlhf.algorithms.ppo.update import Targets
from lowmem_rlhf.engine.passes import head_outputs, with_bootstrap_position
from lowmem_rlhf.engine.roles import CRITIC
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rollout.rollout import Rollout

if TYPE_CHECKING:
    from lowmem_rlhf.training.online import Trainer

_LEAST_STD = 1e-4  # added to the deviation of returns, as to that of scores


class PPO(PolicyGradient):
    """Proximal policy optimisation with a critic on the shared base."""

    unknown = (*PolicyGradient.unknown, "value/loss", "value/explained_variance")

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.returns = RunningMoments()  # of ``ppo.normalize_values``

    def state(self) -> dict[str, Any]:
        """See `PolicyGradient.state`; with the moments of the returns where values are normalised."""
        returns = {"returns": self.returns.state_dict()} if self.settings.normalize_values else {}
        return {**super().state(), **returns}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `PolicyGradient.load_state`."""
        super().load_state(state)
        if "returns" in state:
            self.returns.load_state_dict(state["returns"])

    def critic_values(
        self, rollout: Rollout, rows: Sequence[int], trainer: "Trainer", progress: Progress
    ) -> CriticValues:
        """Return the critic's values, and those behind the last tokens where the settings need them."""
        settings = self.settings
        bootstrap_position = settings.bootstrap_truncated or settings.score_position == "after_last"
        groups = with_bootstrap_position(rollout.groups(rows)) if bootstrap_position else rollout.groups(rows)

        def shown(done: int, total: int) -> None:
            progress.phase("score", done, total)

        values = trainer.ladder.score(
            lambda limits: head_outputs(trainer.base, CRITIC, groups, limits, shown), progress.message
        )
        values = {row: self._in_reward(value) for row, value in values.items()}
        if not bootstrap_position:
            return CriticValues(values)
        bootstrap = {row: value[-1] for row, value in values.items()}
        if settings.score_position == "last":
            values = {row: value[:-1] for row, value in values.items()}
        return CriticValues(values, bootstrap)

    def targets(self, scored: ScoredRollout) -> tuple[Targets, dict[str, Any]]:
        """See `PolicyGradient.targets`."""
        settings, rows = self.settings, scored.rows
        policy, reference, lengths = scored.padded
        if settings.score_position == "after_last":  # TRL's rows are as wide as an answer may be
            room = (0, min(policy.shape[1] + 1, self.max_length) - policy.shape[1])
            policy, reference = (torch.nn.functional.pad(logps, room) for logps in (policy, reference))
        values = pad_rows([scored.critic.values[row] for row in rows])[0][:, : policy.shape[1]]  # (M, L)
        estimated = ppo_advantages(
            policy,
            reference,
            values,
            scored.scores,
            lengths,
            kl_coef=self.kl.value,
            kl_estimator=settings.kl_estimator,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_rewards=settings.whiten_rewards,
            bootstrap=self._bootstrap(scored),
            score_position=settings.score_position,
        )
        old_values = unpad_rows(self._of_head(values), estimated.value_lengths)
        if settings.normalize_values:
            self.returns.update(estimated.returns[token_mask(estimated.value_lengths, values.shape[1])])
        returns = unpad_rows(self._of_head(estimated.returns), estimated.value_lengths)
        targets = Targets(
            scored.logps,
            dict(zip(rows, unpad_rows(estimated.advantages, lengths), strict=True)),
            dict(zip(rows, old_values, strict=True)),
            dict(zip(rows, returns, strict=True)),
            bootstrap_position=settings.score_position == "after_last",
        )
        return targets, _value_metrics(values, estimated)

    def _in_reward(self, values: torch.Tensor) -> torch.Tensor:
        """Return what the critic's head says on the scale of rewards, by the returns up to now."""
        return values * (self.returns.std + _LEAST_STD) + self.returns.mean if self._normalizes else values

    def _of_head(self, values: torch.Tensor) -> torch.Tensor:
        """Return numbers on the scale of rewards as the critic's head says them: the inverse of `_in_reward`."""
        return (values - self.returns.mean) / (self.returns.std + _LEAST_STD) if self._normalizes else values

    @property
    def _normalizes(self) -> bool:
        return self.settings.normalize_values and self.returns.count > 0

    def _bootstrap(self, scored: ScoredRollout) -> torch.Tensor | None:
        """Return what the critic expects behind the answers that were cut (M,), 0 for the others; None: not asked."""
        if not self.settings.bootstrap_truncated:
            return None
        completions = scored.rollout.completions
        ends = [scored.critic.bootstrap[row] * float(completions[row].truncated) for row in scored.rows]
        return torch.stack(ends)


def _value_metrics(values: torch.Tensor, estimated: Advantages) -> dict[str, Any]:
    mask = token_mask(estimated.value_lengths, values.shape[1])
    return {
        "value/explained_variance": explained_variance(values[mask], estimated.returns[mask]),
        "value/mean": float(values[mask].mean()),
        "value/returns_mean": float(estimated.returns[mask].mean()),
        "objective/rlhf_reward": float(zero_padding(estimated.rewards, mask).sum(1).mean()),
    }
