"""GRPO as the online loop's algorithm: group advantages, the reference's pass, and the update of `update`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lowmem_rlhf.algorithms.grpo import group_advantages
from lowmem_rlhf.model.roles import POLICY, REFERENCE
from lowmem_rlhf.recipe import Recipe
from lowmem_rlhf.report.live import LiveView
from lowmem_rlhf.training.metrics import Rollout, all_alike, update_metrics
from lowmem_rlhf.training.online import Learned
from lowmem_rlhf.training.update import Batch, PassSettings, measure, rows_to_train, score, update

if TYPE_CHECKING:
    from lowmem_rlhf.training.online import Trainer


class GRPO:
    """Group-relative policy optimisation with a recipe's settings."""

    def __init__(self, recipe: Recipe) -> None:
        self.settings, self.group = recipe.grpo, recipe.generation.num_generations
        self.max_length = recipe.generation.max_completion_length

    def learn(self, rollout: Rollout, trainer: "Trainer", view: LiveView) -> Learned:
        """Take the optimizer steps on one rollout."""
        base, settings = trainer.base, self.settings
        with trainer.timed("score"):
            batch = self._batch(rollout)
            rows = rows_to_train(batch, settings)
            ref_logps = self._reference(batch, rows, trainer, view)
            quiet = None
            if not rows:  # what the metrics tell of the policy in a step that trains nothing
                with base.role(POLICY):
                    quiet = measure(base, batch, trainer.score_passes, ref_logps)
        with trainer.timed("update"):
            stats, tokens = update(
                base,
                trainer.stepper,
                batch,
                settings,
                self.max_length,
                trainer.passes,
                ref_logps,
                view.message,
                lambda done, total: view.phase("update", done, total),
            )
        trainer.passes = replace(trainer.passes, micro_batch_tokens=tokens)
        if quiet:
            stats = replace(quiet, loss=stats.loss, grad_norm=stats.grad_norm)
        # without an advantage there is no signal: the KL term's gradient is zero while policy and reference agree
        alike = all_alike(rollout)
        signal = [row for row in rows if batch.advantages[row] and not alike[row]]
        return Learned(batch, update_metrics(batch, stats, settings), signal)

    def state(self) -> dict[str, Any]:
        """GRPO keeps nothing between steps."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """GRPO keeps nothing between steps."""

    def _batch(self, rollout: Rollout) -> Batch:
        rewards = torch.tensor(rollout.scores.total, dtype=torch.float32, device="cpu").view(-1, self.group)
        advantages = group_advantages(rewards, self.settings.scale_rewards)
        prompts = [example.prompt_ids for example in rollout.examples]
        return Batch(prompts, rollout.completions, advantages.flatten().tolist(), self.group)

    def _reference(self, batch: Batch, rows: list[int], trainer: "Trainer", view: LiveView) -> dict[int, torch.Tensor]:
        """Score the reference: on all trained rows with beta, otherwise on one a group, to measure the KL."""
        if not self.settings.beta:
            rows = list({row // batch.num_generations: row for row in rows}.values())
        rows = rows or list(range(0, len(batch.completions), batch.num_generations))

        def work(passes: PassSettings) -> dict[int, torch.Tensor]:
            with trainer.base.role(REFERENCE):
                return score(trainer.base, batch, rows, passes, lambda done, total: view.phase("score", done, total))

        return trainer.scored(work, view)
