"""What a loss of GRPO is given, and how it is made of a rollout and a micro-batch.

Shapes: S scored tokens of a micro-batch, R completions of it, N completions of the whole batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lowmem_rlhf.algorithms.grpo.math import importance_weights, kl_term, off_policy_mask, sums_by_row
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.engine.packing import PackedBatch
from lowmem_rlhf.rollout.rollout import Rollout


@dataclass(frozen=True)
class LossInputs:
    """What a loss is given; a completion is never cut between micro-batches.

    Attributes:
        logps: (S,) fp32 log-probs of the policy, in nats; the only one with a gradient.
        old_logps: (S,) of the policy that sampled; in the first iteration the values of ``logps``.
        ref_logps: (S,) of the reference; without beta only some completions have been scored with it, and the others
            have the values of ``logps``.
        advantages: (S,) of each token's completion.
        lengths: (S,) fp32, tokens of each token's completion.
        sampling_weights: (S,) of the correction for the sampler's log-probs (`math.importance_weights`); None: none.
        completions: N, completions without an advantage and masked ones included.
        tokens: tokens of all N completions but the masked ones, at least 1.
        max_completion_length: the limit on the tokens of a completion.
        epsilon_low, epsilon_high: how far a ratio may go from 1.
        beta: weight of the KL term.
        row_index: (S,) the place of each token's completion in the micro-batch, for sums over completions (`by_row`).
        rows: R.
        kept: (S,) 1 where a token's policy term counts and 0 where ``off_policy_mask_threshold`` or
            ``top_entropy_quantile`` leaves it out; None: all count. The KL term is not concerned.
        settings: the recipe's section.
    """

    logps: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor
    advantages: torch.Tensor
    lengths: torch.Tensor
    sampling_weights: torch.Tensor | None
    completions: int
    tokens: int
    max_completion_length: int
    epsilon_low: float
    epsilon_high: float
    beta: float
    row_index: torch.Tensor
    rows: int
    kept: torch.Tensor | None = None
    settings: GRPOSettings = field(default_factory=GRPOSettings)

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of values (S,) over each token's completion, (S,)."""
        return sums_by_row(values, self.row_index, self.rows)

    def ratio(self) -> torch.Tensor:
        """Return the policy's probability of each token over that of the policy that sampled, (S,).

        With ``importance_sampling_level: sequence`` it is that of each token's completion: the geometric mean over its
        tokens (GSPO, arXiv 2507.18071).
        """
        difference = self.logps - self.old_logps
        if self.settings.importance_sampling_level == "sequence":
            difference = self.by_row(difference) / self.lengths
        return difference.exp()

    def objective(self, surrogate: torch.Tensor, ratio: torch.Tensor, weighted: bool = True) -> torch.Tensor:
        """Return a policy term (S,) with its masks, its weights and the KL term, not yet normalised.

        Args:
            surrogate: (S,).
            ratio: (S,) from `ratio`.
            weighted: whether ``sampling_weights`` multiply the surrogate.
        """
        if self.kept is not None:
            surrogate = surrogate * self.kept
        if weighted and self.sampling_weights is not None:
            surrogate = surrogate * self.sampling_weights
        if self.beta:
            kl = kl_term(ratio, self.logps, self.ref_logps, self.settings.use_bias_correction_kl)
            surrogate = surrogate + self.beta * kl
        return surrogate


LossFunction = Callable[[LossInputs], torch.Tensor]


class BatchInputs:
    """Makes the loss's inputs of each micro-batch; what is the whole batch's is made once.

    Args:
        rollout: the batch, with advantages.
        settings: the recipe's section.
        max_completion_length: the limit on the tokens of a completion.
        kept: by row, which tokens' policy terms count (see `entropy.high_entropy_tokens`); None: all.
    """

    def __init__(
        self,
        rollout: Rollout,
        settings: GRPOSettings,
        max_completion_length: int,
        kept: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self.rollout, self.settings, self.max_completion_length = rollout, settings, max_completion_length
        self.kept = kept
        if kept:
            self.kept_tokens = torch.cat(list(kept.values())).sum().clamp(min=1)  # on the device
        self.lengths = [len(c.ids) for c in rollout.completions]
        self.tokens = max(sum(n for n, c in zip(self.lengths, counted(rollout, settings), strict=True) if c), 1)
        self.epsilon_high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high

    def __call__(
        self, packed: PackedBatch, logps: torch.Tensor, old_logps: torch.Tensor, ref_logps: torch.Tensor
    ) -> LossInputs:
        """Return the inputs of a micro-batch with these log-probs (S,)."""
        settings, advantages = self.settings, self.rollout.known_advantages
        row_values = [(advantages[row], self.lengths[row]) for row in packed.rows]
        per_token = torch.tensor(row_values, dtype=torch.float32, device=logps.device).index_select(0, packed.row_index)
        return LossInputs(
            logps,
            old_logps,
            ref_logps,
            advantages=per_token[:, 0],
            lengths=per_token[:, 1],
            sampling_weights=sampling_correction(self.rollout, packed.rows, old_logps, settings),
            completions=len(self.lengths),
            tokens=self.tokens,
            max_completion_length=self.max_completion_length,
            epsilon_low=settings.epsilon,
            epsilon_high=self.epsilon_high,
            beta=settings.beta,
            row_index=packed.row_index,
            rows=len(packed.rows),
            kept=self._kept(packed, logps.detach(), per_token),
            settings=settings,
        )

    def share_of_entropy(self, packed: PackedBatch, entropies: torch.Tensor) -> torch.Tensor:
        """Return a micro-batch's share of the mean entropy of all tokens that count, of the `kept` ones if any are not.

        Args:
            entropies: (S,).
        """
        if self.kept is None:
            return entropies.sum() / self.tokens
        return (entropies * torch.cat([self.kept[row] for row in packed.rows])).sum() / self.kept_tokens

    def _kept(self, packed: PackedBatch, logps: torch.Tensor, per_token: torch.Tensor) -> torch.Tensor | None:
        kept = None
        if self.kept is not None:
            kept = torch.cat([self.kept[row] for row in packed.rows])
        threshold = self.settings.off_policy_mask_threshold
        if threshold is not None:
            drawn, (advantages, lengths) = sampled_logps(self.rollout, packed.rows, logps.device), per_token.unbind(1)
            near = off_policy_mask(logps, drawn, advantages, lengths, packed.row_index, len(packed.rows), threshold)
            kept = near if kept is None else kept & near
        return None if kept is None else kept.to(logps.dtype)


def counted(rollout: Rollout, settings: GRPOSettings) -> list[bool]:
    """Return which completions count: all, or those that were not cut."""
    return [not (settings.mask_truncated_completions and c.truncated) for c in rollout.completions]


def sampled_logps(rollout: Rollout, rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the log-probs with which the tokens of these completions were drawn, one after the other."""
    drawn = [logp for row in rows for logp in rollout.completions[row].logps]
    return torch.tensor(drawn, dtype=torch.float32, device=device)


def sampling_correction(
    rollout: Rollout, rows: Sequence[int], old_logps: torch.Tensor, settings: GRPOSettings
) -> torch.Tensor | None:
    """Return the weights (S,) that correct for the sampler's log-probs of these completions; None: not asked for."""
    if not settings.importance_sampling_correction:
        return None
    return importance_weights(
        old_logps,
        sampled_logps(rollout, rows, old_logps.device),
        [len(rollout.completions[row].ids) for row in rows],
        settings.importance_sampling_mode,
        settings.importance_sampling_clip_min,
        settings.importance_sampling_clip_max,
    )
