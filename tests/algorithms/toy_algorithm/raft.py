"""RAFT as an algorithm of one's own: sample, keep each prompt's completions above its mean, learn these as SFT does.

Dong et al. 2023, "RAFT: Reward rAnked FineTuning", with a share of a prompt's completions in place of the best one.
Named in a recipe as ``algorithm: raft.py:RAFT``; its spec loads without torch, so planning does too.
"""

from dataclasses import replace
from typing import Any

from pydantic import Field

from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.recipe.section import Section


class RaftSettings(Section):
    """The recipe's section `raft`."""

    margin: float = Field(0.0, ge=0)  # by how much a reward must be above its prompt's mean


class Raft:
    """Learns from each prompt's better completions."""

    def __init__(self, recipe: Any) -> None:
        self.margin, self.group = recipe.raft.margin, recipe.generation.num_generations

    def learn(self, rollout: Any, trainer: Any, progress: Any) -> Any:
        """Take one optimizer step on the mean log-prob of the better completions' tokens."""
        from lowmem_rlhf.engine.passes import completion_logprobs, micro_batches, packed_logprobs
        from lowmem_rlhf.engine.roles import POLICY
        from lowmem_rlhf.training.loop import StepOutput
        from lowmem_rlhf.training.metrics import sampling_difference

        totals, base = rollout.scored.total, trainer.base
        means = [sum(totals[i : i + self.group]) / self.group for i in range(0, len(totals), self.group)]
        above = [float(total > means[row // self.group] + self.margin) for row, total in enumerate(totals)]
        rollout = replace(rollout, advantages=above)
        rows = [row for row, better in enumerate(above) if better]
        tokens = sum(len(rollout.completions[row].ids) for row in rows)

        def score(limits: Any) -> Any:
            with base.role(POLICY):
                return completion_logprobs(base, rollout.groups(range(len(totals))), limits)

        def work(limits: Any) -> float:
            trainer.optimizer.zero_grad()
            loss = 0.0
            with base.role(POLICY):
                for packed in micro_batches(base, rollout.groups(rows), limits.micro_batch_tokens):
                    logps, _ = packed_logprobs(base, packed, limits.temperature, limits.tile)
                    share = -logps.sum() / tokens
                    (share * trainer.optimizer.loss_scale).backward()
                    loss += float(share.detach())
            return loss

        with trainer.timed("score"):
            difference = sampling_difference(rollout, trainer.ladder.score(score, progress.message))
        with trainer.timed("update"):
            loss = trainer.ladder.update(work, progress.message)
            norm = trainer.optimizer.step()
            base.adapters_changed()
            trainer.optimizer.drop_gradients()
        metrics = {"loss": loss, "grad_norm": norm, "tokens/trained": tokens, "sampling/logp_difference": difference}
        return StepOutput(metrics, tokens, rollout=rollout)

    def state(self) -> dict[str, Any]:
        """Nothing is kept between steps."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing is kept between steps."""


RAFT = AlgorithmSpec(
    name="raft",
    title="RAFT",
    section="raft",
    settings=RaftSettings,
    compares=lambda recipe: "RAFT",
    learner=Raft,
)
NO_SPEC = RaftSettings
