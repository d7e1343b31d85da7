"""GRPO as the online loop's algorithm: group advantages, the reference's pass, and the update of `update`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lowmem_rlhf.algorithms.grpo.entropy import EntropyCoefficient
from lowmem_rlhf.algorithms.grpo.following import Follower
from lowmem_rlhf.algorithms.grpo.math import group_advantages
from lowmem_rlhf.algorithms.grpo.metrics import update_metrics
from lowmem_rlhf.algorithms.grpo.update import Objective, UpdateStats, measure, rows_to_train, update
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.training.loop import StepOutput
from lowmem_rlhf.training.metrics import all_alike

if TYPE_CHECKING:
    from lowmem_rlhf.training.online import Trainer


class GRPO:
    """Group-relative policy optimisation with a recipe's settings.

    Raises:
        UserError: the loss of ``grpo.loss_type`` cannot be used.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.objective = Objective.of(recipe.grpo, recipe.generation.max_completion_length)
        self.settings = recipe.grpo
        self.max_generation_batches = recipe.grpo.max_generation_batches
        self.set_aside_steps = recipe.grpo.set_aside_steps
        self.entropy = EntropyCoefficient(recipe.grpo)
        self.follower = Follower(recipe) if recipe.grpo.sync_ref_model else None
        self.masks_cut = recipe.grpo.mask_truncated_completions  # nothing is learned from completions that were cut

    def learn(self, rollout: Rollout, trainer: "Trainer", progress: Progress) -> StepOutput:
        """Take the optimizer steps on one rollout."""
        stepped = self.follower.of_step(trainer, progress) if self.follower else None
        with trainer.timed("score"):
            rollout = replace(rollout, advantages=self._advantages(rollout))
            rows = rows_to_train(rollout, self.objective)
            ref_logps = self._reference(rollout, rows, trainer, progress)
            quiet = None if rows else self._measured(rollout, ref_logps, trainer, progress)
        with trainer.timed("update"):
            given = (rollout, self.objective, trainer.ladder, ref_logps, progress, self.entropy)
            stats = update(trainer.base, trainer.optimizer, *given, stepped)
        if quiet:
            stats = replace(quiet, loss=stats.loss, grad_norm=stats.grad_norm)
        learned = sum(len(rollout.completions[row].ids) for row in self._with_signal(rollout, rows))
        metrics = update_metrics(rollout, stats, self.settings)
        if self.settings.entropy_bonus:
            metrics |= {"entropy_coef": self.entropy.value, "policy_loss": stats.policy_loss}
        if self.follower:
            metrics |= self.follower.metrics
        return StepOutput(metrics, learned, rollout=rollout)

    def state(self) -> dict[str, Any]:
        """Return the entropy's coefficient where it adapts, and what the reference holds where it follows."""
        entropy = {"entropy": self.entropy.state_dict()} if self.settings.use_adaptive_entropy else {}
        return {**entropy, **({"reference": self.follower.state_dict()} if self.follower else {})}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        if self.settings.use_adaptive_entropy:
            self.entropy.load_state_dict(state["entropy"])
        if self.follower:
            self.follower.load_state_dict(state["reference"])

    def _advantages(self, rollout: Rollout) -> list[float]:
        rewards = torch.tensor(rollout.scored.total, dtype=torch.float32, device="cpu")
        grouped = rewards.view(-1, rollout.num_generations)
        return group_advantages(grouped, self.settings.scale_rewards).flatten().tolist()

    def _with_signal(self, rollout: Rollout, rows: list[int]) -> list[int]:
        """Return the trained rows that teach something.

        Without an advantage there is no signal: the KL term's gradient is zero while policy and reference agree.
        """
        if not self.objective.loss.needs_advantage:
            return rows
        alike, advantages = all_alike(rollout), rollout.known_advantages
        return [row for row in rows if advantages[row] and not alike[row]]

    def _measured(
        self, rollout: Rollout, ref_logps: dict[int, torch.Tensor], trainer: "Trainer", progress: Progress
    ) -> UpdateStats:
        """Return what the metrics tell of the policy in a step that trains nothing."""
        with trainer.base.role(POLICY):
            return trainer.ladder.score(
                lambda limits: measure(trainer.base, rollout, limits, ref_logps), progress.message
            )

    def _reference(
        self, rollout: Rollout, rows: list[int], trainer: "Trainer", progress: Progress
    ) -> dict[int, torch.Tensor]:
        """Score the reference: on all trained rows with beta, otherwise on one a group, to measure the KL."""
        if not self.settings.beta:
            rows = list({row // rollout.num_generations: row for row in rows}.values())
        rows = rows or list(range(0, len(rollout.completions), rollout.num_generations))

        def shown(done: int, total: int) -> None:
            progress.phase("score", done, total)

        def work(limits: BatchLimits) -> dict[int, torch.Tensor]:
            with trainer.base.role(REFERENCE):
                return completion_logprobs(trainer.base, rollout.groups(rows), limits, shown)

        return trainer.ladder.score(work, progress.message)
