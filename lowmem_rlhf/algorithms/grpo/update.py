"""Scoring and the policy update: packed micro-batches sized in tokens, one optimizer step as for the whole batch.

What is left out: nothing of GRPO. A completion whose advantage is zero has a gradient of exactly zero when there is no
KL term; it is not run through the model then, but it counts in every mean of the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from lowmem_rlhf.algorithms.common.kl import k3
from lowmem_rlhf.algorithms.grpo.math import importance_weights, token_loss, token_weights
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import PackedBatch
from lowmem_rlhf.engine.passes import LEAST_TOKENS, BatchLimits, micro_batches, packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.hardware.memory import retry_with_smaller
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.rollout.rollout import Batch
from lowmem_rlhf.training.optimizer import Optimizer


@dataclass
class UpdateStats:
    """What an update did; the sums are over the completion tokens that have a gradient.

    Attributes:
        loss: of the whole batch, before the update.
        grad_norm: of the last iteration, before clipping.
        tokens: tokens fed to the model, over all iterations.
        scored: completion tokens with a gradient.
        entropy, kl: sums before the update; kl over ``kl_tokens`` of them.
        clipped_low, clipped_high: tokens outside the clip range, over all iterations, of ``clip_tokens``.
        logps: the policy's log-probs before the update, by row.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    tokens: int = 0
    scored: int = 0
    entropy: float = 0.0
    kl: float = 0.0
    kl_tokens: int = 0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    clip_tokens: int = 0
    logps: dict[int, torch.Tensor] = field(default_factory=dict)


def rows_to_train(batch: Batch, settings: GRPOSettings) -> list[int]:
    """Return the completions that have any gradient: all that count, less those of zero advantage when beta is 0."""
    counted = _counted(batch, settings)
    return [n for n, counts in enumerate(counted) if counts and (settings.beta or batch.advantages[n])]


def _counted(batch: Batch, settings: GRPOSettings) -> list[bool]:
    return [not (settings.mask_truncated_completions and c.truncated) for c in batch.completions]


def backward(
    base: SharedBase,
    batch: Batch,
    settings: GRPOSettings,
    max_completion_length: int,
    passes: BatchLimits,
    ref_logps: dict[int, torch.Tensor],
    old_logps: dict[int, torch.Tensor] | None = None,
    loss_scale: float = 1.0,
    progress: ProgressCallback | None = None,
) -> UpdateStats:
    """Add the gradient of the whole batch's loss to the adapter's gradients.

    To be called in the policy's role.

    Args:
        ref_logps: of the reference, by row; with beta all trained rows, otherwise any rows whose KL is to be measured.
        old_logps: of the policy before the first iteration, by row; None: it is the policy as it is now.
        loss_scale: multiplies the loss (float16).
    """
    stats = UpdateStats()
    lengths = [len(c.ids) for c in batch.completions]
    weights = token_weights(lengths, _counted(batch, settings), settings.loss_type, max_completion_length)
    groups = batch.groups(rows_to_train(batch, settings))
    for packed in micro_batches(base, groups, passes.micro_batch_tokens, progress):
        logps, entropies = packed_logprobs(base, packed, passes.temperature, passes.tile)
        own = dict(zip(packed.rows, logps.detach().split(packed.lengths), strict=True))
        old = torch.cat([(old_logps or own)[row] for row in packed.rows])
        ref, measured = _reference(packed, ref_logps, own)
        row_values = [(batch.advantages[row], weights[row]) for row in packed.rows]
        per_token = torch.tensor(row_values, dtype=torch.float32, device=base.device).index_select(0, packed.row_index)
        high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
        correction = sampling_correction(batch, packed.rows, old, settings)
        result = token_loss(logps, old, per_token[:, 0], settings.epsilon, high, ref, settings.beta, correction)
        loss = (result.loss * per_token[:, 1]).sum()
        (loss * loss_scale).backward()
        stats.loss += float(loss.detach())
        stats.tokens += packed.input_ids.numel()
        stats.scored += packed.targets.numel()
        stats.entropy += float(entropies.detach().sum())
        stats.kl += float((result.kl * measured).sum())
        stats.kl_tokens += int(measured.sum())
        stats.clipped_low += float(result.clipped_low.sum())
        stats.clipped_high += float(result.clipped_high.sum())
        stats.clip_tokens += packed.targets.numel()
        stats.logps.update(own)
    return stats


def sampling_correction(
    batch: Batch, rows: Sequence[int], old_logps: torch.Tensor, settings: GRPOSettings
) -> torch.Tensor | None:
    """Return the weights (S,) that correct for the sampler's log-probs of these completions; None: not asked for."""
    if not settings.importance_sampling_correction:
        return None
    drawn = [batch.completions[row].logps for row in rows]
    return importance_weights(
        old_logps,
        torch.tensor([logp for logps in drawn for logp in logps], dtype=torch.float32, device=old_logps.device),
        [len(logps) for logps in drawn],
        settings.importance_sampling_mode,
        settings.importance_sampling_clip_min,
        settings.importance_sampling_clip_max,
    )


@torch.no_grad()
def measure(base: SharedBase, batch: Batch, passes: BatchLimits, ref_logps: dict[int, torch.Tensor]) -> UpdateStats:
    """Return log-probs, entropy and KL of the policy on the rows that the reference has scored, without an update."""
    stats = UpdateStats()
    for packed in micro_batches(base, batch.groups(list(ref_logps)), passes.micro_batch_tokens):
        logps, entropies = packed_logprobs(base, packed, passes.temperature, passes.tile)
        own = dict(zip(packed.rows, logps.split(packed.lengths), strict=True))
        ref, _ = _reference(packed, ref_logps, own)
        stats.kl += float(k3(logps, ref).sum())
        stats.kl_tokens += packed.targets.numel()
        stats.scored += packed.targets.numel()
        stats.entropy += float(entropies.sum())
        stats.logps.update(own)
    return stats


def _reference(
    packed: PackedBatch, ref_logps: dict[int, torch.Tensor], own: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reference's log-probs (S,) and which of them there are; the policy's own stand for the others."""
    ref = torch.cat([ref_logps.get(row, own[row]) for row in packed.rows])
    measured = torch.cat([torch.full_like(own[row], float(row in ref_logps)) for row in packed.rows])
    return ref, measured


def update(
    base: SharedBase,
    optimizer: Optimizer,
    batch: Batch,
    settings: GRPOSettings,
    max_completion_length: int,
    passes: BatchLimits,
    ref_logps: dict[int, torch.Tensor],
    say: Callable[[str], None],
    progress: ProgressCallback | None = None,
) -> tuple[UpdateStats, int]:
    """Take ``num_iterations`` optimizer steps on one rollout.

    Returns:
        The statistics, and the micro-batch size that fitted into memory.

    Raises:
        RunError: memory runs out whatever the micro-batch size; the optimizer step in question was not taken.
    """
    first: UpdateStats | None = None
    tokens = passes.micro_batch_tokens
    for _ in range(settings.num_iterations):
        old = first.logps if first else None

        def gradient(size: int, old: dict[int, torch.Tensor] | None = old) -> UpdateStats:
            optimizer.zero_grad()
            sized = replace(passes, micro_batch_tokens=size)
            with base.role(POLICY):
                return backward(
                    base, batch, settings, max_completion_length, sized, ref_logps, old, optimizer.loss_scale, progress
                )

        stats, tokens = retry_with_smaller(
            gradient, tokens, LEAST_TOKENS, "hardware.micro_batch_tokens", base.device, say
        )
        norm = optimizer.step()
        base.adapters_changed()
        if first is None:
            first = stats
        else:
            first.tokens += stats.tokens
            first.clipped_low += stats.clipped_low
            first.clipped_high += stats.clipped_high
            first.clip_tokens += stats.clip_tokens
        first.grad_norm = norm
    optimizer.drop_gradients()
    assert first is not None
    return first, tokens
