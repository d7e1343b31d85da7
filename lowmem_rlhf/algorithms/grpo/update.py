"""Scoring and the policy update: packed micro-batches sized in tokens, one optimizer step as for the whole batch.

What is left out: nothing of GRPO. A completion whose advantage is zero has a gradient of exactly zero when there is no
KL term; it is not run through the model then, but it counts in every mean of the loss. A batch of such completions
alone moves no weight, where TRL's optimizer drifts on by its momentum and its weight decay.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lowmem_rlhf.algorithms.common.device_sums import DeviceSums
from lowmem_rlhf.algorithms.common.kl import k3
from lowmem_rlhf.algorithms.grpo.entropy import EntropyCoefficient, high_entropy_tokens
from lowmem_rlhf.algorithms.grpo.inputs import BatchInputs, LossInputs, counted
from lowmem_rlhf.algorithms.grpo.losses import Loss, load_loss, measured
from lowmem_rlhf.algorithms.grpo.math import kl_term
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.logprobs import Entropy
from lowmem_rlhf.engine.packing import PackedBatch
from lowmem_rlhf.engine.passes import BatchLimits, micro_batches, packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.processes.world import current
from lowmem_rlhf.progress import Progress, ProgressCallback
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.training.optimizer import Optimizer

Rows = dict[int, torch.Tensor]  # numbers of tokens, by a completion's row


@dataclass(frozen=True)
class Objective:
    """What an update minimises.

    Attributes:
        settings: the recipe's section.
        max_completion_length: the limit on the tokens of a completion.
        loss: of ``settings.loss_type``.
    """

    settings: GRPOSettings
    max_completion_length: int
    loss: Loss

    @classmethod
    def of(cls, settings: GRPOSettings, max_completion_length: int) -> "Objective":
        """Return the objective of a recipe's settings.

        Raises:
            UserError: see `load_loss`.
        """
        return cls(settings, max_completion_length, load_loss(settings.loss_type, settings))


@dataclass
class UpdateStats:
    """What an update did; the sums are over the completion tokens that have a gradient.

    Attributes:
        loss: of the whole batch, before the update.
        grad_norm: of the last iteration, before clipping.
        tokens: tokens fed to the model, over all iterations.
        scored: completion tokens with a gradient.
        entropy, kl: sums before the update; kl over ``kl_tokens`` of them.
        policy_loss: the loss without the entropy bonus.
        mean_entropy: of the tokens that the bonus is for; only with a bonus.
        clipped_low, clipped_high, phi_seq, left_out: see `losses.measured`; these and what they are shares of, tokens
            and completions, are counted over all iterations.
        logps: the policy's log-probs before the update, by row.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    tokens: int = 0
    scored: int = 0
    entropy: float = 0.0
    policy_loss: float = 0.0
    mean_entropy: float = 0.0
    kl: float = 0.0
    kl_tokens: int = 0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    phi_seq: float = 0.0
    left_out: float = 0.0
    clip_tokens: int = 0
    clip_completions: int = 0
    logps: Rows = field(default_factory=dict)

    def with_sums(self, sums: DeviceSums, device: torch.device) -> "UpdateStats":
        """Return these with what was added up on the device, and with what other processes did."""
        read: dict[str, Any] = sums.read()
        if "kl_tokens" in read:
            read["kl_tokens"] = int(read["kl_tokens"])
        counts = ("tokens", "scored", "clip_tokens", "clip_completions")
        world = current()
        whole = map(int, world.sum(*(getattr(self, name) for name in counts)))
        return replace(self, **dict(zip(counts, whole, strict=True)), **read, logps=world.rows(self.logps, device))

    def go_on(self, later: "UpdateStats") -> None:
        """Take in what a later iteration did: all that is counted over all iterations."""
        for name in ("tokens", "clipped_low", "clipped_high", "phi_seq", "left_out", "clip_tokens", "clip_completions"):
            setattr(self, name, getattr(self, name) + getattr(later, name))


def rows_to_train(rollout: Rollout, objective: Objective) -> list[int]:
    """Return the completions that have any gradient: of those that count all, or those with an advantage."""
    advantages = rollout.known_advantages
    settings = objective.settings
    every = settings.beta or settings.entropy_bonus or not objective.loss.needs_advantage
    return [n for n, counts in enumerate(counted(rollout, settings)) if counts and (every or advantages[n])]


def backward(
    base: SharedBase,
    rollout: Rollout,
    objective: Objective,
    limits: BatchLimits,
    ref_logps: Rows,
    old_logps: Rows | None = None,
    loss_scale: float = 1.0,
    progress: ProgressCallback | None = None,
    kept: Rows | None = None,
    entropy_coef: float = 0.0,
) -> UpdateStats:
    """Add the gradient of the whole batch's loss to the adapter's gradients.

    To be called in the policy's role.

    Args:
        ref_logps: of the reference, by row; with beta all trained rows, otherwise any rows whose KL is to be measured.
        old_logps: of the policy before the first iteration, by row; None: it is the policy as it is now.
        loss_scale: multiplies the loss (float16).
        kept: see `high_entropy_tokens`; None: all tokens.
        entropy_coef: of the mean entropy of the kept tokens, which is subtracted from the loss.
    """
    stats, sums = UpdateStats(), DeviceSums()
    inputs_of = BatchInputs(rollout, objective.settings, objective.max_completion_length, kept)
    groups = rollout.groups(rows_to_train(rollout, objective))
    kind: Entropy = "gradient" if entropy_coef else "value"
    for packed in micro_batches(base, groups, limits.micro_batch_tokens, progress):
        logps, entropies = packed_logprobs(base, packed, limits.temperature, limits.tile, kind)
        own = dict(zip(packed.rows, logps.detach().split(packed.lengths), strict=True))
        old = torch.cat([(old_logps or own)[row] for row in packed.rows])
        ref, scored = _reference(packed, ref_logps, own)
        inputs = inputs_of(packed, logps, old, ref)
        loss = objective.loss.function(inputs).sum()
        if objective.settings.entropy_bonus:
            entropy = inputs_of.share_of_entropy(packed, entropies)
            sums.add(policy_loss=loss, mean_entropy=entropy)
            loss = loss - entropy_coef * entropy if entropy_coef else loss
        (loss * loss_scale).backward()
        stats.tokens += packed.input_ids.numel()
        sums.add(loss=loss, entropy=entropies.detach().sum())
        stats.logps.update(own)
        _measure(stats, sums, inputs, scored)
    return stats.with_sums(sums, base.device)


def _measure(stats: UpdateStats, sums: DeviceSums, inputs: LossInputs, scored: torch.Tensor) -> None:
    """Add what is told of a micro-batch to the statistics; ``scored`` (S,) is 1 where the reference has scored."""
    with torch.no_grad():
        ratio = inputs.ratio()
        kl = kl_term(ratio, inputs.logps, inputs.ref_logps, inputs.settings.use_bias_correction_kl)
    stats.scored += len(kl)
    sums.add(kl=(kl * scored).sum(), kl_tokens=scored.sum(), **measured(inputs, ratio))
    stats.clip_tokens += len(kl)
    stats.clip_completions += inputs.rows


@torch.no_grad()
def measure(base: SharedBase, rollout: Rollout, limits: BatchLimits, ref_logps: Rows) -> UpdateStats:
    """Return log-probs, entropy and KL of the policy on the rows that the reference has scored, without an update."""
    stats, sums = UpdateStats(), DeviceSums()
    for packed in micro_batches(base, rollout.groups(list(ref_logps)), limits.micro_batch_tokens):
        logps, entropies = packed_logprobs(base, packed, limits.temperature, limits.tile)
        own = dict(zip(packed.rows, logps.split(packed.lengths), strict=True))
        ref, _ = _reference(packed, ref_logps, own)
        sums.add(kl=k3(logps, ref).sum(), entropy=entropies.sum())
        stats.kl_tokens += packed.targets.numel()
        stats.scored += packed.targets.numel()
        stats.logps.update(own)
    return stats.with_sums(sums, base.device)


def _reference(packed: PackedBatch, ref_logps: Rows, own: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reference's log-probs (S,) and which of them there are; the policy's own stand for the others."""
    ref = torch.cat([ref_logps.get(row, own[row]) for row in packed.rows])
    scored = torch.cat([torch.full_like(own[row], float(row in ref_logps)) for row in packed.rows])
    return ref, scored


def update(
    base: SharedBase,
    optimizer: Optimizer,
    rollout: Rollout,
    objective: Objective,
    ladder: Ladder,
    ref_logps: Rows,
    progress: Progress,
    entropy: EntropyCoefficient | None = None,
    stepped: Callable[[int], None] | None = None,
) -> UpdateStats:
    """Take ``num_iterations`` optimizer steps on one rollout.

    Args:
        entropy: the weight of the entropy bonus, which adapts to each optimizer step; None: as the recipe begins.
        stepped: is told after each of them how many there were.

    Raises:
        RunError: memory runs out whatever the micro-batch size; the optimizer step in question was not taken.
    """
    first: UpdateStats | None = None
    settings, entropy = objective.settings, entropy or EntropyCoefficient(objective.settings)

    def shown(done: int, total: int) -> None:
        progress.phase("update", done, total)

    def high(limits: BatchLimits) -> Rows:
        return high_entropy_tokens(base, rollout, settings, limits)

    asks = settings.top_entropy_quantile < 1 and bool(rows_to_train(rollout, objective))
    for number in range(settings.num_iterations):
        old = first.logps if first else None
        kept = ladder.score(high, progress.message) if asks else None

        def gradient(limits: BatchLimits, old: Rows | None = old, kept: Rows | None = kept) -> UpdateStats:
            optimizer.zero_grad()
            scale, coefficient = optimizer.loss_scale, entropy.applied
            with base.role(POLICY):
                return backward(base, rollout, objective, limits, ref_logps, old, scale, shown, kept, coefficient)

        stats = ladder.update(gradient, progress.message)
        norm = optimizer.step(stats.loss, logits=stats.entropy)
        if stats.scored:
            entropy.update(stats.mean_entropy)
        base.adapters_changed()
        if stepped is not None:
            stepped(number + 1)
        if first is None:
            first = stats
        else:
            first.go_on(stats)
        first.grad_norm = norm
    optimizer.drop_gradients()
    assert first is not None
    return first
