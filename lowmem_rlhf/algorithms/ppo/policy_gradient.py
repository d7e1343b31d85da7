"""What PPO, RLOO and REINFORCE++ share as the online loop's algorithms.

A rollout is scored in two roles (policy, reference) on one base, with PPO in a third (critic); the KL penalty and the
score become the tokens' rewards, these become advantages, and `ppo.update` takes the steps. An algorithm is what makes
the targets of a scored rollout, and whether a critic has a say in them.

Shapes: M completions that a reward applies to, L tokens of the longest one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lowmem_rlhf.algorithms.common.kl import AdaptiveKLController, FixedKLController, kl_estimate
from lowmem_rlhf.algorithms.common.padded import pad_rows, token_mask, zero_padding
from lowmem_rlhf.algorithms.common.shaping import RunningMoments, shape_scores
from lowmem_rlhf.algorithms.ppo.update import Rows, Targets, UpdateResult, update
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.training.loop import StepOutput
from lowmem_rlhf.training.metrics import sampling_difference

if TYPE_CHECKING:
    from lowmem_rlhf.training.online import Trainer


@dataclass(frozen=True)
class CriticValues:
    """What the critic says, by row.

    Attributes:
        values: at each position with a value.
        bootstrap: behind the last token, a number each; empty where it was not asked.
    """

    values: Rows = field(default_factory=dict)
    bootstrap: Rows = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with what the other roles say of it.

    Attributes:
        rollout: the whole one.
        rows: (M,) the completions that a reward applies to.
        logps, ref_logps: of policy and reference, by row.
        scores: (M,) shaped.
        kl_estimator: see `kl_estimate`.
        critic: what the critic says, if there is one.
    """

    rollout: Rollout
    rows: Sequence[int]
    logps: Rows
    ref_logps: Rows
    scores: torch.Tensor
    kl_estimator: str
    critic: CriticValues = field(default_factory=CriticValues)

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs of policy and reference (M, L), and the lengths (M,)."""
        policy, lengths = pad_rows([self.logps[row] for row in self.rows])
        return policy, pad_rows([self.ref_logps[row] for row in self.rows])[0], lengths

    @cached_property
    def kl(self) -> torch.Tensor:
        """Estimates of the divergence from the reference (M, L), in nats, with zeros on the padding."""
        policy, reference, lengths = self.padded
        mask = token_mask(lengths, policy.shape[1])
        return zero_padding(kl_estimate(policy, reference, self.kl_estimator), mask)


class PolicyGradient(ABC):
    """An algorithm with a clipped policy gradient and a KL penalty in its rewards, with a recipe's settings."""

    # metrics that are None in a step in which no reward applies to any completion
    unknown: tuple[str, ...] = (
        *("kl", "entropy", "sampling/logp_difference", "policy/approx_kl", "policy/clip_fraction"),
    )

    def __init__(self, recipe: Recipe) -> None:
        ppo = self.settings = recipe.ppo
        self.seed, self.max_length = recipe.training.seed, recipe.generation.max_completion_length
        self.kl = (
            AdaptiveKLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
            if ppo.kl_target
            else FixedKLController(ppo.kl_coef)
        )
        self.moments = RunningMoments()

    @abstractmethod
    def targets(self, scored: ScoredRollout) -> tuple[Targets, dict[str, Any]]:
        """Return what the update is given, and metrics of it; ``self.kl.value`` is the coefficient of the penalty."""

    def critic_values(
        self, rollout: Rollout, rows: Sequence[int], trainer: "Trainer", progress: Progress
    ) -> CriticValues:
        """Ask the critic about these completions; an algorithm without one has nothing to ask."""
        return CriticValues()

    def state(self) -> dict[str, Any]:
        """Return the KL coefficient and the moments of the scores so far."""
        return {"kl": self.kl.state_dict(), "moments": self.moments.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.kl.load_state_dict(state["kl"])
        self.moments.load_state_dict(state["moments"])

    def learn(self, rollout: Rollout, trainer: "Trainer", progress: Progress) -> StepOutput:
        """Score one rollout in all roles and take the optimizer steps."""
        rows = [row for row, total in enumerate(rollout.scored.total) if total == total]  # NaN: no reward applies
        if not rows:
            without = replace(rollout, advantages=[0.0] * len(rollout.completions))
            return StepOutput(self._nothing(), 0, rollout=without)
        with trainer.timed("score"):
            scored = self._score(rollout, rows, trainer, progress)
            alone = self.settings.critic_warmup_steps > trainer.step and bool(scored.critic.values)
            targets, metrics = self.penalized(scored, adapts=not alone)
        with trainer.timed("update"):
            seed = f"mini-batches/{self.seed}/{trainer.step}"
            result = update(
                trainer.base, trainer.optimizer, rollout, targets, self.settings, trainer.ladder, seed, progress, alone
            )
        means = {row: float(targets.advantages[row].mean()) for row in rows}
        rollout = replace(rollout, advantages=[means.get(row, 0.0) for row in range(len(rollout.completions))])
        learned = sum(len(rollout.completions[row].ids) for row in rows if bool(targets.advantages[row].any()))
        learned = 0 if alone else learned  # by the policy
        metrics |= self._update_metrics(result, trainer)
        metrics["sampling/logp_difference"] = sampling_difference(rollout, scored.logps)
        return StepOutput(metrics, learned, rollout=rollout)

    def _score(self, rollout: Rollout, rows: list[int], trainer: "Trainer", progress: Progress) -> ScoredRollout:
        """Ask policy, reference and critic about the completions, and shape their scores."""
        base = trainer.base

        def shown(done: int, total: int) -> None:
            progress.phase("score", done, total)

        def logps(role: str) -> Rows:
            def work(limits: BatchLimits) -> Rows:
                with base.role(role):
                    return completion_logprobs(base, rollout.groups(rows), limits, shown)

            return trainer.ladder.score(work, progress.message)

        policy, reference = logps(POLICY), logps(REFERENCE)
        critic = self.critic_values(rollout, rows, trainer, progress)
        scores = self._shaped(rollout, rows, base.device)
        return ScoredRollout(rollout, rows, policy, reference, scores, self.settings.kl_estimator, critic)

    def _shaped(self, rollout: Rollout, rows: Sequence[int], device: torch.device) -> torch.Tensor:
        settings = self.settings
        totals = torch.tensor([rollout.scored.total[row] for row in rows], dtype=torch.float32, device=device)
        cut = torch.tensor([rollout.completions[row].truncated for row in rows], dtype=torch.bool, device=device)
        return shape_scores(
            totals,
            cut,
            normalize=settings.normalize_scores,
            moments=self.moments,
            cliprange_reward=settings.cliprange_reward,
            missing_eos_penalty=settings.missing_eos_penalty,
        )

    def penalized(self, scored: ScoredRollout, adapts: bool = True) -> tuple[Targets, dict[str, Any]]:
        """Return `targets`, with metrics of the penalty too; the KL coefficient adapts afterwards.

        Args:
            scored: the rollout.
            adapts: False while the critic learns alone, when there is no KL.
        """
        coefficient = self.kl.value
        per_completion = float(scored.kl.sum(1).mean())
        metrics: dict[str, Any] = {
            "kl": float(scored.kl.sum() / scored.padded[2].sum()),
            "objective/kl": per_completion,
            "objective/kl_coef": coefficient,
            "objective/scores": float(scored.scores.mean()),
            "objective/non_score_reward": -coefficient * per_completion,
        }
        targets, more = self.targets(scored)
        if adapts and math.isfinite(per_completion):  # else the update leaves its steps out, and says why
            self.kl.update(per_completion, len(scored.rows))
        return targets, {**metrics, **more}

    def _update_metrics(self, result: UpdateResult, trainer: "Trainer") -> dict[str, Any]:
        assert result.first is not None
        unknown = {name: None for name in self.unknown if name.startswith("policy/") and not result.scored}
        return {
            **unknown,
            **result.stats.metrics(),
            "policy/approx_kl_first": result.first.metrics().get("policy/approx_kl"),
            "policy/epochs": result.epochs,
            "entropy": result.entropy / result.scored if result.scored else None,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            **({"grad_norm/critic": trainer.optimizer.own_norm} if trainer.optimizer.own else {}),
            "tokens/trained": result.tokens,
        }

    def _nothing(self) -> dict[str, Any]:
        """Return the metrics of a step in which no reward applies to any completion."""
        still = {"loss": 0.0, "grad_norm": 0.0, "tokens/trained": 0, "time/score": 0.0, "time/update": 0.0}
        return {**dict.fromkeys(self.unknown), **still}
