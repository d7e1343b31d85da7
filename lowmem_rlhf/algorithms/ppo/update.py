"""The update of PPO, RLOO and REINFORCE++: epochs of mini-batches, each one optimizer step whatever it is cut into.

Every normaliser (tokens of the mini-batch, its positions with a value, its completions) is known before the first
backward pass. What is left out: nothing is dropped from a mini-batch; with a critic of its own, policy and critic are
two passes one after the other, so that the activations of one are alive at a time.

Shapes: S scored tokens of a micro-batch, S' its positions with a value.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings
from lowmem_rlhf.algorithms.ppo.math import policy_loss, value_loss
from lowmem_rlhf.algorithms.ppo.stats import PPOStatistics
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.logprobs import Entropy, tiled_logprobs
from lowmem_rlhf.engine.packing import PackedBatch
from lowmem_rlhf.engine.passes import LEAST_TOKENS, BatchLimits, micro_batches, with_bootstrap_position
from lowmem_rlhf.engine.roles import CRITIC, POLICY
from lowmem_rlhf.hardware.memory import retry_with_smaller
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.rollout.rollout import Batch
from lowmem_rlhf.training.optimizer import Optimizer

Rows = dict[int, torch.Tensor]  # by row of the batch: one number a token


@dataclass(frozen=True)
class Targets:
    """What a rollout says to policy and critic, by row.

    Attributes:
        old_logps: of the policy that sampled.
        advantages: of each token; where ``by_sequence`` is, of the completion (one number).
        old_values, returns: of each position with a value; None without a critic.
        by_sequence: the ratio is of whole completions (RLOO).
        bootstrap_position: values have one position more than there are tokens (``score_position: after_last``), where
            the batch has room for it.
    """

    old_logps: Rows
    advantages: Rows
    old_values: Rows | None = None
    returns: Rows | None = None
    by_sequence: bool = False
    bootstrap_position: bool = False


@dataclass
class UpdateResult:
    """What all epochs did.

    Attributes:
        stats: sums over all mini-batches.
        first: those of the first mini-batch, where the policy is still the one that sampled.
        entropy, scored: sum over the scored tokens of the first epoch, and their number.
        loss: mean over the mini-batches.
        grad_norm: of the last one, before clipping.
        tokens: tokens fed to the model, over all passes.
        epochs: that were begun; fewer than asked for after an early stop.
    """

    stats: PPOStatistics = field(default_factory=PPOStatistics)
    first: PPOStatistics | None = None
    entropy: float = 0.0
    scored: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    tokens: int = 0
    epochs: int = 0


@dataclass
class _Part:
    """What the passes over one mini-batch add up to."""

    stats: PPOStatistics = field(default_factory=PPOStatistics)
    entropy: float = 0.0
    scored: int = 0
    loss: float = 0.0
    tokens: int = 0


def mini_batches(rows: Sequence[int], count: int, seed: str) -> list[list[int]]:
    """Return the rows in random order, dealt out to at most ``count`` mini-batches of nearly equal size."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    count = min(count, len(order))
    return [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]


def update(
    base: SharedBase,
    optimizer: Optimizer,
    batch: Batch,
    rows: Sequence[int],
    targets: Targets,
    settings: PPOSettings,
    passes: BatchLimits,
    seed: str,
    say: Callable[[str], None],
    progress: ProgressCallback | None = None,
) -> tuple[UpdateResult, int]:
    """Take ``num_ppo_epochs * num_mini_batches`` optimizer steps on one rollout, fewer after an early stop.

    Returns:
        What was done, and the micro-batch size that fitted into memory.

    Raises:
        RunError: memory runs out whatever the micro-batch size; the optimizer step in question was not taken.
    """
    result, tokens = UpdateResult(), passes.micro_batch_tokens
    epochs = range(settings.num_ppo_epochs)
    minis = [(e, mini) for e in epochs for mini in mini_batches(rows, settings.num_mini_batches, f"{seed}/{e}")]
    done = 0
    for done, (epoch, mini) in enumerate(minis, 1):

        def gradient(size: int, mini: list[int] = mini) -> _Part:
            optimizer.zero_grad()
            sized = replace(passes, micro_batch_tokens=size)
            return backward(base, batch, mini, targets, settings, sized, optimizer.loss_scale)

        part, tokens = retry_with_smaller(
            gradient, tokens, LEAST_TOKENS, "hardware.micro_batch_tokens", base.device, say
        )
        _take_in(result, part, epoch)
        if done > 1 and settings.target_kl and part.stats.metrics()["policy/approx_kl"] > 1.5 * settings.target_kl:
            say(f"epoch {epoch + 1}: approx_kl is above 1.5 times ppo.target_kl; the step ends here")
            break
        result.grad_norm = optimizer.step()
        base.adapters_changed()
        if progress:
            progress(done, len(minis))
    result.loss /= done
    optimizer.drop_gradients()
    return result, tokens


def _take_in(result: UpdateResult, part: _Part, epoch: int) -> None:
    result.stats.merge(part.stats)
    result.first = result.first or part.stats
    result.loss += part.loss
    result.tokens += part.tokens
    result.epochs = epoch + 1
    if epoch == 0:
        result.entropy += part.entropy
        result.scored += part.scored


def backward(
    base: SharedBase,
    batch: Batch,
    rows: Sequence[int],
    targets: Targets,
    settings: PPOSettings,
    passes: BatchLimits,
    loss_scale: float = 1.0,
) -> _Part:
    """Add the gradient of a mini-batch's loss to the adapters': policy, value and entropy terms.

    ``policy / its tokens + vf_coef * value / its positions - entropy_coef * entropy / its tokens``.
    """
    part = _Part()
    lengths = sum(len(batch.completions[row].ids) for row in rows)
    shared = base.roles.get(CRITIC) == base.roles[POLICY] and targets.returns is not None
    one_pass = shared and not targets.bootstrap_position
    with base.role(POLICY):
        for packed in micro_batches(base, batch.groups(rows), passes.micro_batch_tokens):
            states = base.states(packed).index_select(0, packed.predict)
            loss = _policy_term(base, states, packed, targets, settings, passes, len(rows), lengths, part)
            if one_pass:
                loss = loss + _value_term(base, states, packed, targets, settings, lengths, part)
            (loss * loss_scale).backward()
            part.tokens += packed.input_ids.numel()
            del states, loss  # they hold the policy's 16-bit adapters, which the critic's pass has no use for
    if targets.returns is not None and not one_pass:
        _critic_backward(base, batch, rows, targets, settings, passes, loss_scale, part)
    return part


def _critic_backward(
    base: SharedBase,
    batch: Batch,
    rows: Sequence[int],
    targets: Targets,
    settings: PPOSettings,
    passes: BatchLimits,
    loss_scale: float,
    part: _Part,
) -> None:
    assert targets.returns is not None
    valued = sum(len(targets.returns[row]) for row in rows)
    groups = with_bootstrap_position(batch.groups(rows)) if targets.bootstrap_position else batch.groups(rows)
    with base.role(CRITIC):
        for packed in micro_batches(base, groups, passes.micro_batch_tokens):
            states = base.states(packed).index_select(0, packed.predict)
            loss = _value_term(base, states, packed, targets, settings, valued, part)
            (loss * loss_scale).backward()
            part.tokens += packed.input_ids.numel()


def _policy_term(
    base: SharedBase,
    states: torch.Tensor,
    packed: PackedBatch,
    targets: Targets,
    settings: PPOSettings,
    passes: BatchLimits,
    rows: int,
    tokens: int,
    part: _Part,
) -> torch.Tensor:
    kind: Entropy = "gradient" if settings.entropy_coef else "value"
    logps, entropies = tiled_logprobs(states, packed.targets, base.head, passes.temperature, passes.tile, kind)  # (S,)
    old = torch.cat([targets.old_logps[row] for row in packed.rows])
    advantages = torch.cat([targets.advantages[row] for row in packed.rows])
    if targets.by_sequence:
        logps, old = _sums(logps, packed), _sums(old, packed)
    result = policy_loss(logps, old, advantages, settings.cliprange)
    loss = result.loss.sum() / (rows if targets.by_sequence else tokens)
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropies.sum() / tokens
    part.stats.add(result)
    part.entropy += float(entropies.detach().sum())
    part.scored += packed.targets.numel()
    part.loss += float(loss.detach())
    return loss


def _value_term(
    base: SharedBase,
    states: torch.Tensor,
    packed: PackedBatch,
    targets: Targets,
    settings: PPOSettings,
    positions: int,
    part: _Part,
) -> torch.Tensor:
    assert targets.returns is not None and targets.old_values is not None
    values = base.outputs(CRITIC, states).split(packed.lengths)
    wanted = [targets.returns[row] for row in packed.rows]
    values = torch.cat([value[: len(one)] for value, one in zip(values, wanted, strict=True)])  # (S',)
    old = torch.cat([targets.old_values[row] for row in packed.rows])
    result = value_loss(values, old, torch.cat(wanted), settings.cliprange_value)
    loss = settings.vf_coef * result.loss.sum() / positions
    part.stats.add_value(result)
    part.loss += float(loss.detach())
    return loss


def _sums(values: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """Return the sums over the tokens of each completion."""
    return torch.stack([one.sum() for one in values.split(packed.lengths)])
