"""PPO, RLOO and REINFORCE++ as the online loop's algorithm.

A rollout is scored in three roles (policy, reference, critic) on one base; the KL penalty and the score become the
tokens' rewards, these become advantages (`algorithms`), and `ppo_update` takes the steps. RLOO and REINFORCE++ are the
same without a critic.

Shapes: N completions, L tokens of the longest one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lowmem_rlhf.algorithms.common.kl import AdaptiveKLController, FixedKLController, kl_estimate
from lowmem_rlhf.algorithms.common.padded import pad_rows, token_mask, unpad_rows, zero_padding
from lowmem_rlhf.algorithms.common.shaping import RunningMoments, shape_scores
from lowmem_rlhf.algorithms.ppo.math import explained_variance, ppo_advantages
from lowmem_rlhf.algorithms.ppo.update import Rows, Targets, UpdateResult, update
from lowmem_rlhf.algorithms.reinforce_plus_plus.math import reinforce_plus_plus_advantages
from lowmem_rlhf.algorithms.rloo.math import rloo_advantages, sequence_rewards
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs, head_outputs, with_bootstrap_position
from lowmem_rlhf.engine.roles import CRITIC, POLICY, REFERENCE
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rollout.rollout import Batch
from lowmem_rlhf.training.metrics import Rollout, sampling_difference
from lowmem_rlhf.training.online import Learned

if TYPE_CHECKING:
    from lowmem_rlhf.training.online import Trainer


class PPO:
    """PPO with a critic on the shared base, or one of the algorithms without (`recipe.algorithm`)."""

    def __init__(self, recipe: Recipe) -> None:
        self.settings, self.algorithm = recipe.ppo, recipe.algorithm
        self.group, self.seed = recipe.generation.num_generations, recipe.training.seed
        self.max_length = recipe.generation.max_completion_length
        ppo = recipe.ppo
        self.kl = (
            AdaptiveKLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
            if ppo.kl_target
            else FixedKLController(ppo.kl_coef)
        )
        self.moments = RunningMoments()

    def state(self) -> dict[str, Any]:
        """Return the KL coefficient and the moments of the scores so far."""
        return {"kl": self.kl.state_dict(), "moments": self.moments.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.kl.load_state_dict(state["kl"])
        self.moments.load_state_dict(state["moments"])

    def learn(self, rollout: Rollout, trainer: "Trainer", progress: Progress) -> Learned:
        """Score one rollout in all roles and take the optimizer steps."""
        before = self.state()
        try:
            return self._learn(rollout, trainer, progress)
        except BaseException:
            self.load_state(before)  # the step will be taken again, by the run that resumes
            raise

    def _learn(self, rollout: Rollout, trainer: "Trainer", progress: Progress) -> Learned:
        prompts = [example.prompt_ids for example in rollout.examples]
        batch = Batch(prompts, rollout.completions, [0.0] * len(rollout.completions), self.group)
        rows = [row for row, total in enumerate(rollout.scores.total) if total == total]  # NaN: no reward applies
        if not rows:
            return Learned(batch, self._nothing(), [])
        with trainer.timed("score"):
            logps, refs, values, bootstrap_values = self._score(batch, rows, trainer, progress)
            scores = self._shaped(rollout, rows, trainer.base.device)
            targets, metrics = self._targets(batch, rows, logps, refs, values, bootstrap_values, scores)
        with trainer.timed("update"):
            done, tokens = update(
                trainer.base,
                trainer.optimizer,
                batch,
                rows,
                targets,
                self.settings,
                trainer.passes,
                f"mini-batches/{self.seed}/{trainer.step}",
                progress.message,
                lambda done, total: progress.phase("update", done, total),
            )
        trainer.passes = replace(trainer.passes, micro_batch_tokens=tokens)
        advantages = [0.0] * len(batch.completions)
        for row in rows:
            advantages[row] = float(targets.advantages[row].mean())
        batch = replace(batch, advantages=advantages)
        signal = [row for row in rows if bool(targets.advantages[row].any())]
        metrics |= self._update_metrics(done) | {"sampling/logp_difference": sampling_difference(batch, logps)}
        return Learned(batch, metrics, signal)

    def _score(
        self, batch: Batch, rows: Sequence[int], trainer: "Trainer", progress: Progress
    ) -> tuple[Rows, Rows, Rows, Rows]:
        """Return log-probs of policy and reference, the critic's values, and its value behind the last token."""
        base = trainer.base

        def shown(done: int, total: int) -> None:
            progress.phase("score", done, total)

        def logps(role: str) -> Rows:
            def work(passes: BatchLimits) -> Rows:
                with base.role(role):
                    return completion_logprobs(base, batch.groups(rows), passes, shown)

            return trainer.scored(work, progress)

        policy, reference = logps(POLICY), logps(REFERENCE)
        if self.algorithm != "ppo":
            return policy, reference, {}, {}
        bootstrap_position = self.settings.bootstrap_truncated or self.settings.score_position == "after_last"
        groups = with_bootstrap_position(batch.groups(rows)) if bootstrap_position else batch.groups(rows)
        values = trainer.scored(lambda passes: head_outputs(base, CRITIC, groups, passes, shown), progress)
        if not bootstrap_position:
            return policy, reference, values, {}
        bootstrap_values = {row: value[-1] for row, value in values.items()}
        if self.settings.score_position == "last":
            values = {row: value[:-1] for row, value in values.items()}
        return policy, reference, values, bootstrap_values

    def _shaped(self, rollout: Rollout, rows: Sequence[int], device: torch.device) -> torch.Tensor:
        settings = self.settings
        totals = torch.tensor([rollout.scores.total[row] for row in rows], dtype=torch.float32, device=device)
        cut = torch.tensor([rollout.completions[row].truncated for row in rows], dtype=torch.bool, device=device)
        return shape_scores(
            totals,
            cut,
            normalize=settings.normalize_scores,
            moments=self.moments,
            cliprange_reward=settings.cliprange_reward,
            missing_eos_penalty=settings.missing_eos_penalty,
        )

    def _targets(
        self,
        batch: Batch,
        rows: Sequence[int],
        logps: Rows,
        refs: Rows,
        values: Rows,
        bootstrap_values: Rows,
        scores: torch.Tensor,
    ) -> tuple[Targets, dict[str, Any]]:
        """Return what the update is given, and what the scoring measured; adapts the KL coefficient afterwards."""
        settings, coefficient = self.settings, self.kl.value
        policy, lengths = pad_rows([logps[row] for row in rows])  # (N, L)
        reference, _ = pad_rows([refs[row] for row in rows])
        mask = token_mask(lengths, policy.shape[1])
        kl = zero_padding(kl_estimate(policy, reference, settings.kl_estimator), mask)
        per_completion = float(kl.sum(1).mean())
        metrics: dict[str, Any] = {
            "kl": float(kl.sum() / lengths.sum()),
            "objective/kl": per_completion,
            "objective/kl_coef": coefficient,
            "objective/scores": float(scores.mean()),
            "objective/non_score_reward": -coefficient * per_completion,
        }
        if self.algorithm == "ppo":
            targets, more = self._with_critic(
                batch, rows, policy, reference, lengths, values, bootstrap_values, scores, logps
            )
        else:
            targets, more = self._without_critic(rows, kl, lengths, scores, logps), {}
        self.kl.update(per_completion, len(rows))
        return targets, {**metrics, **more}

    def _with_critic(
        self,
        batch: Batch,
        rows: Sequence[int],
        policy: torch.Tensor,
        reference: torch.Tensor,
        lengths: torch.Tensor,
        values: Rows,
        bootstrap_values: Rows,
        scores: torch.Tensor,
        logps: Rows,
    ) -> tuple[Targets, dict[str, Any]]:
        settings = self.settings
        if settings.score_position == "after_last":  # TRL's rows are as wide as an answer may be
            room = (0, min(policy.shape[1] + 1, self.max_length) - policy.shape[1])
            policy, reference = (torch.nn.functional.pad(logps, room) for logps in (policy, reference))
        valued = pad_rows([values[row] for row in rows])[0][:, : policy.shape[1]]  # (N, L)
        bootstrap = None
        if settings.bootstrap_truncated:
            ends = [bootstrap_values[row] * float(batch.completions[row].truncated) for row in rows]
            bootstrap = torch.stack(ends)
        made = ppo_advantages(
            policy,
            reference,
            valued,
            scores,
            lengths,
            kl_coef=self.kl.value,
            kl_estimator=settings.kl_estimator,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_rewards=settings.whiten_rewards,
            bootstrap=bootstrap,
            score_position=settings.score_position,
        )
        old_values = unpad_rows(valued, made.value_lengths)
        returns = unpad_rows(made.returns, made.value_lengths)
        targets = Targets(
            logps,
            dict(zip(rows, unpad_rows(made.advantages, lengths), strict=True)),
            dict(zip(rows, old_values, strict=True)),
            dict(zip(rows, returns, strict=True)),
            bootstrap_position=settings.score_position == "after_last",
        )
        mask = token_mask(made.value_lengths, valued.shape[1])
        metrics = {
            "value/explained_variance": explained_variance(valued[mask], made.returns[mask]),
            "value/mean": float(valued[mask].mean()),
            "value/returns_mean": float(made.returns[mask].mean()),
            "objective/rlhf_reward": float(zero_padding(made.rewards, mask).sum(1).mean()),
        }
        return targets, metrics

    def _without_critic(
        self, rows: Sequence[int], kl: torch.Tensor, lengths: torch.Tensor, scores: torch.Tensor, logps: Rows
    ) -> Targets:
        """Return RLOO's or REINFORCE++'s targets; a completion that no reward applies to leaves its group smaller."""
        coefficient, settings = self.kl.value, self.settings
        if self.algorithm == "rloo":
            groups = max(rows) // self.group + 1
            rewards = torch.full((groups * self.group,), float("nan"), dtype=torch.float32, device=kl.device)
            rewards[list(rows)] = sequence_rewards(scores, kl, lengths, coefficient)
            of_all = rloo_advantages(rewards.view(groups, self.group), settings.normalize_advantages).flatten()
            return Targets(logps, {row: of_all[row].view(1) for row in rows}, by_sequence=True)
        prompts = torch.tensor([row // self.group for row in rows], dtype=torch.long, device=kl.device)
        compared = prompts if settings.group_baseline else None
        advantages = reinforce_plus_plus_advantages(kl, scores, lengths, coefficient, settings.gamma, compared)
        return Targets(logps, dict(zip(rows, unpad_rows(advantages, lengths), strict=True)))

    def _update_metrics(self, done: UpdateResult) -> dict[str, Any]:
        assert done.first is not None
        first = done.first.metrics()
        return {
            **done.stats.metrics(),
            "policy/approx_kl_first": first["policy/approx_kl"],
            "policy/epochs": done.epochs,
            "entropy": done.entropy / done.scored,
            "loss": done.loss,
            "grad_norm": done.grad_norm,
            "tokens/trained": done.tokens,
        }

    def _nothing(self) -> dict[str, Any]:
        """Return the metrics of a step in which no reward applies to any completion."""
        unknown = ["kl", "entropy", "sampling/logp_difference", "policy/approx_kl", "policy/clip_fraction"]
        unknown += ["value/loss", "value/explained_variance"] if self.algorithm == "ppo" else []
        still = {"loss": 0.0, "grad_norm": 0.0, "tokens/trained": 0, "time/score": 0.0, "time/update": 0.0}
        return {**dict.fromkeys(unknown), **still}
