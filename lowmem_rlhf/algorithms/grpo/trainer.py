"""GRPO as the online loop's algorithm: group advantages, the reference's pass, and the update of `update`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lowmem_rlhf.algorithms.grpo.math import group_advantages
from lowmem_rlhf.algorithms.grpo.metrics import update_metrics
from lowmem_rlhf.algorithms.grpo.update import measure, rows_to_train, update
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rollout.rollout import Batch
from lowmem_rlhf.training.metrics import Rollout, all_alike
from lowmem_rlhf.training.online import Learned

if TYPE_CHECKING:
    from lowmem_rlhf.training.online import Trainer


class GRPO:
    """Group-relative policy optimisation with a recipe's settings."""

    def __init__(self, recipe: Recipe) -> None:
        self.settings, self.group = recipe.grpo, recipe.generation.num_generations
        self.max_length = recipe.generation.max_completion_length

    def learn(self, rollout: Rollout, trainer: "Trainer", progress: Progress) -> Learned:
        """Take the optimizer steps on one rollout."""
        base, settings = trainer.base, self.settings
        with trainer.timed("score"):
            batch = self._batch(rollout)
            rows = rows_to_train(batch, settings)
            ref_logps = self._reference(batch, rows, trainer, progress)
            quiet = None
            if not rows:  # what the metrics tell of the policy in a step that trains nothing
                with base.role(POLICY):
                    quiet = measure(base, batch, trainer.score_passes, ref_logps)
        with trainer.timed("update"):
            stats, tokens = update(
                base,
                trainer.optimizer,
                batch,
                settings,
                self.max_length,
                trainer.passes,
                ref_logps,
                progress.message,
                lambda done, total: progress.phase("update", done, total),
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

    def _reference(
        self, batch: Batch, rows: list[int], trainer: "Trainer", progress: Progress
    ) -> dict[int, torch.Tensor]:
        """Score the reference: on all trained rows with beta, otherwise on one a group, to measure the KL."""
        if not self.settings.beta:
            rows = list({row // batch.num_generations: row for row in rows}.values())
        rows = rows or list(range(0, len(batch.completions), batch.num_generations))

        def shown(done: int, total: int) -> None:
            progress.phase("score", done, total)

        def work(passes: BatchLimits) -> dict[int, torch.Tensor]:
            with trainer.base.role(REFERENCE):
                return completion_logprobs(
                    trainer.base, batch.groups(rows), passes, lambda done, total: progress.phase("score", done, total)
                )

        return trainer.scored(work, progress)
