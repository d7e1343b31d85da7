"""Reward models from preference pairs on the packed engine.

One optimizer step is exactly that of its whole batch, whatever the batch is cut into: the number of pairs is known
before the first backward pass.

Shapes: N completions, two a pair.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lowmem_rlhf.algorithms.reward_model.math import pair_loss
from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.data.supervised import Pair
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import (
    BatchLimits,
    head_outputs,
    last_of_each,
    micro_batches,
    packed_outputs,
    with_bootstrap_position,
)
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.processes.world import current
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import ACCURACY
from lowmem_rlhf.training.intervals import Column, bounds
from lowmem_rlhf.training.loop import Loop, StepOutput
from lowmem_rlhf.training.quantities import of_losses, of_pairs


class RewardModel(Loop):
    """A reward model from preference pairs: an adapter and a score head, read at an answer's last token.

    Both answers of a pair share their prompt's tokens in one row. The adapter takes the policy's place on the base.
    """

    nothing_learned = "nothing was learned: no pair was trained on"

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        train: Sequence[Pair],
        held_out: Sequence[Pair],
        run: RunDirectory,
    ) -> None:
        base.add_head(POLICY, std=(base.hidden_size + 1) ** -0.5, seed=recipe.training.seed)
        saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision) if recipe.adapter else None
        if saved is not None and saved.head is not None:
            base.load_head(saved.folder, POLICY)  # it goes on as a whole
        super().__init__(recipe, plan, base, run)
        self.stream = PromptStream(train, recipe.training.prompts_per_step, recipe.training.seed)
        self.held_out = held_out

    def one_step(self, progress: Progress) -> StepOutput:
        """Learn from the next pairs."""
        pairs = self.stream.batch(self.step)
        groups = pair_groups(pairs)

        def work(limits: BatchLimits) -> tuple[float, torch.Tensor, int]:
            self.optimizer.zero_grad()
            scale = self.optimizer.loss_scale  # which the host reads from the device
            scores = head_outputs(self.base, POLICY, groups, limits)
            ends = torch.stack([scores[row][-1] for row in range(2 * len(pairs))]).requires_grad_()  # (N,)
            loss = self._losses(ends, pairs).mean()
            (slope,) = torch.autograd.grad(loss, ends)  # so the pairs may be cut anywhere
            fed = 0
            with self.base.role(POLICY):
                for packed in micro_batches(self.base, groups, limits.micro_batch_tokens):
                    values = last_of_each(packed_outputs(self.base, POLICY, packed), packed)
                    rows = torch.tensor(packed.rows, dtype=torch.long, device=values.device)
                    ((values * slope.index_select(0, rows)).sum() * scale).backward()
                    fed += packed.input_ids.numel()
                    progress.phase("update", fed, None)
            return float(loss.detach()), ends.detach(), int(current().sum(fed)[0])

        with self.timed("update"):
            loss, ends, fed = self.ladder.update(work, progress.message)
            norm = self.optimizer.step(loss, scores=float(ends.abs().sum()))
            self.base.adapters_changed()
            self.optimizer.drop_gradients()
        metrics = {"loss": loss, "grad_norm": norm, "tokens/trained": fed, **_pair_metrics(ends, pairs)}
        every = self.recipe.reward_model.eval_steps
        if every and self.held_out and (self.step + 1) % every == 0:
            measured, _ = self._measure(progress)
            metrics |= {f"eval/{name}": value for name, value in measured.items()}
        return StepOutput(metrics, sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs))

    def _losses(self, ends: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
        margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float32, device=ends.device)
        return pair_loss(ends[::2], ends[1::2], margins, self.recipe.reward_model.center_rewards_coefficient)

    def _measure(self, progress: Progress) -> tuple[dict[str, float], dict[str, Column]]:
        """Return what is measured on held-out pairs, and of its parts what each pair has."""
        groups = pair_groups(self.held_out)

        def shown(done: int, total: int) -> None:
            progress.phase("evaluation", done, total)

        scores = self.ladder.score(
            lambda limits: head_outputs(self.base, POLICY, groups, limits, shown), progress.message
        )
        ends = torch.stack([scores[row][-1] for row in range(2 * len(self.held_out))])
        losses = self._losses(ends, self.held_out)
        columns = {**of_losses(losses.tolist(), [1] * len(self.held_out)), **of_pairs(ends[::2], ends[1::2])}
        return {"loss": float(losses.mean()), **_pair_metrics(ends, self.held_out)}, columns

    def evaluate(self, when: str, progress: Progress) -> dict[str, Any]:
        """Return loss, accuracy (of pairs) and mean margin on held-out pairs."""
        if not self.held_out:
            return {}
        measured, columns = self._measure(progress)
        more = {"problems": len(self.held_out), "headline": ACCURACY, "intervals": bounds(columns)}
        return {**measured, **more}


def pair_groups(pairs: Sequence[Pair]) -> list[Group]:
    """Return a group for each pair, read to the last tokens: row 2i is the better answer, 2i + 1 the worse."""
    return with_bootstrap_position(
        [Group(p.prompt_ids, [p.chosen_ids, p.rejected_ids], [2 * i, 2 * i + 1]) for i, p in enumerate(pairs)]
    )


def _pair_metrics(ends: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the share of pairs in the right order, a tie being half, and the scores' mean difference and mean."""
    difference = (ends[::2] - ends[1::2]).float()
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return {
        "accuracy": float(right.mean()),
        "score/margin": float(difference.mean()),
        "score/mean": float(ends.mean()),
    }
