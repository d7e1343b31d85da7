"""Supervised fine-tuning on the packed, tiled engine.

One optimizer step is exactly that of its whole batch, whatever the batch is cut into: the number of learned tokens is
known before the first backward pass.

Shapes: S scored tokens of a micro-batch.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lowmem_rlhf.algorithms.common.device_sums import DeviceSums
from lowmem_rlhf.data.curriculum import stream_of
from lowmem_rlhf.data.supervised import Supervised
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.packing import Group, scored_only
from lowmem_rlhf.engine.passes import BatchLimits, micro_batches, packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.processes.world import current
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import LOSS
from lowmem_rlhf.training.intervals import bounds, perplexity, with_perplexity
from lowmem_rlhf.training.loop import Loop, StepOutput
from lowmem_rlhf.training.online import STREAM, CompletionEvaluator
from lowmem_rlhf.training.quantities import of_losses


class SFT(Loop):
    """Supervised fine-tuning of the policy's adapter.

    Args:
        recipe, plan, base, run: see `Loop`.
        train, held_out: examples to learn from, and to measure the loss on.
        evaluator: samples and scores held-out completions, where the recipe has rewards.
        ladder: see `Loop`.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        train: Sequence[Supervised],
        held_out: Sequence[Supervised],
        run: RunDirectory,
        evaluator: CompletionEvaluator | None = None,
        ladder: Ladder | None = None,
    ) -> None:
        super().__init__(recipe, plan, base, run, ladder=ladder)
        self.stream = stream_of(train, recipe)
        self.held_out, self.evaluator = held_out, evaluator

    def state(self) -> dict[str, Any]:
        """See `Loop.state`."""
        return {STREAM: state} if (state := self.stream.state()) else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Loop.load_state`."""
        self.stream.load_state(state.get(STREAM))

    def one_step(self, progress: Progress) -> StepOutput:
        """Learn from the next examples."""
        examples = self.stream.batch(self.step)
        groups, masks = _groups(examples), _masks(examples)
        learned = sum(one.learned_tokens for one in examples)

        def work(limits: BatchLimits) -> tuple[float, float, int]:
            self.optimizer.zero_grad()
            scale = self.optimizer.loss_scale  # which the host reads from the device
            sums, fed = DeviceSums(), 0
            with self.base.role(POLICY):
                for packed in micro_batches(self.base, groups, limits.micro_batch_tokens):
                    packed = scored_only(packed, masks)
                    logps, entropies = packed_logprobs(self.base, packed, 1.0, limits.tile)
                    share = -logps.sum() / learned
                    (share * scale).backward()
                    sums.add(loss=share, entropy=entropies.sum())
                    fed += packed.input_ids.numel()
                    progress.phase("update", fed, None)
            read = sums.read()
            return read["loss"], read["entropy"], int(current().sum(fed)[0])

        with self.timed("update"):
            loss, entropy, fed = self.ladder.update(work, progress.message)
            norm = self.optimizer.step(loss, logits=entropy)
            self.base.adapters_changed()
            self.optimizer.drop_gradients()
        metrics = {"loss": loss, "entropy": entropy / learned, "grad_norm": norm, "tokens/trained": fed}
        return StepOutput({**metrics, "tokens/learned": learned, **self._held_out_loss(progress)}, learned)

    def _held_out_loss(self, progress: Progress) -> dict[str, float]:
        every = self.recipe.sft.eval_steps
        if not every or not self.held_out or (self.step + 1) % every:
            return {}
        return {"eval/loss": self.loss(self.held_out, progress)}

    def loss(self, examples: Sequence[Supervised], progress: Progress) -> float:
        """Return the mean loss over all learned tokens of the examples, in the policy's role."""
        return self._losses(examples, progress)[0]

    @torch.no_grad()
    def _losses(self, examples: Sequence[Supervised], progress: Progress) -> tuple[float, list[float]]:
        """Return the mean loss over all learned tokens, and the sum over each example's."""
        groups, masks = _groups(examples), _masks(examples)

        def shown(done: int, total: int) -> None:
            progress.phase("evaluation", done, total)

        def work(limits: BatchLimits) -> tuple[float, list[float]]:
            sums, each, rows = DeviceSums(), list[torch.Tensor](), list[int]()
            with self.base.role(POLICY):
                for packed in micro_batches(self.base, groups, limits.micro_batch_tokens, shown):
                    packed = scored_only(packed, masks)
                    logps, _ = packed_logprobs(self.base, packed, 1.0, limits.tile, entropy="none")
                    sums.add(loss=-logps.sum())
                    each += [-one.sum() for one in logps.split(packed.lengths)]
                    rows += packed.rows
            own = dict(zip(rows, torch.stack(each).tolist() if each else [], strict=True))
            ordered = {row: loss for part in current().gather(own) for row, loss in part.items()}
            return sums.read()["loss"], [ordered[row] for row in range(len(examples))]

        total, each = self.ladder.score(work, progress.message)
        return total / sum(one.learned_tokens for one in examples), each

    def evaluate(self, when: str, progress: Progress) -> dict[str, Any]:
        """Return the held-out loss, and what is said of sampled completions where the recipe has rewards."""
        if not self.held_out:
            return {}
        loss, each = self._losses(self.held_out, progress)
        not_sampled: dict[str, Any] = {"accuracy": None, "headline": LOSS}
        sampled = self.evaluator.evaluate(when, progress) if self.evaluator else not_sampled
        told = self._told(range(len(self.held_out)), loss, each, sampled)
        if self.recipe.tasks:
            told["tasks"] = {}
            for task in self.recipe.by_task:
                if rows := [row for row, one in enumerate(self.held_out) if one.task == task]:
                    own = sum(each[row] for row in rows) / sum(self.held_out[row].learned_tokens for row in rows)
                    told["tasks"][task] = self._told(rows, own, each, sampled.get("tasks", {}).get(task, not_sampled))
        return told

    def _told(self, rows: Sequence[int], loss: float, each: Sequence[float], sampled: dict[str, Any]) -> dict[str, Any]:
        """Return what is told of held-out examples, by their places, with their mean loss."""
        tokens = [self.held_out[row].learned_tokens for row in rows]
        own = with_perplexity(bounds(of_losses([each[row] for row in rows], tokens)))
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            **sampled,
            "problems": len(rows),
            "intervals": {**own, **sampled.get("intervals", {})},
        }


def _groups(examples: Sequence[Supervised]) -> list[Group]:
    return [Group(one.prompt_ids, [one.completion_ids], [row]) for row, one in enumerate(examples)]


def _masks(examples: Sequence[Supervised]) -> dict[int, tuple[bool, ...]]:
    """Return by row which tokens are learned, where not all are."""
    return {row: one.learned for row, one in enumerate(examples) if one.learned is not None}
