"""The update of PPO, RLOO and REINFORCE++: epochs of mini-batches, each one optimizer step whatever it is cut into.

Every normaliser (tokens of the mini-batch, its positions with a value, its completions) is known before the first
backward pass. What is left out: nothing is dropped from a mini-batch; with a critic of its own, policy and critic are
two passes one after the other, so that the activations of one are alive at a time.

Shapes: S scored tokens of a micro-batch, S' its positions with a value.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lowmem_rlhf.algorithms.common.device_sums import DeviceSums
from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings
from lowmem_rlhf.algorithms.ppo.math import policy_loss, value_loss
from lowmem_rlhf.algorithms.ppo.stats import PPOStatistics, merged
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.logprobs import Entropy, tiled_logprobs
from lowmem_rlhf.engine.packing import PackedBatch
from lowmem_rlhf.engine.passes import BatchLimits, micro_batches, with_bootstrap_position
from lowmem_rlhf.engine.roles import CRITIC, POLICY
from lowmem_rlhf.processes.world import current
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.training.optimizer import Optimizer

Rows = dict[int, torch.Tensor]  # by row of the batch: one number a token


@dataclass(frozen=True)
class Targets:
    """What policy and critic are to learn from a rollout, by row.

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
class MiniBatchResult:
    """What the passes over one mini-batch add up to; see `UpdateResult`."""

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
    rollout: Rollout,
    targets: Targets,
    settings: PPOSettings,
    ladder: Ladder,
    seed: str,
    progress: Progress,
    critic_alone: bool = False,
) -> UpdateResult:
    """Take ``num_ppo_epochs * num_mini_batches`` optimizer steps on one rollout, fewer after an early stop.

    Args:
        targets: of the rows that are learned from.
        seed: of the order in which rows come into mini-batches.
        critic_alone: the policy stays as it is; only what is the critic's own learns.

    Raises:
        RunError: memory runs out whatever the micro-batch size; the optimizer step in question was not taken.
    """
    result, rows = UpdateResult(), list(targets.advantages)
    still = set(base.trainable()) - set(base.own_trainable(CRITIC)) if critic_alone else ()
    epochs = range(settings.num_ppo_epochs)
    minis = [(e, mini) for e in epochs for mini in mini_batches(rows, settings.num_mini_batches, f"{seed}/{e}")]
    done = 0
    for done, (epoch, mini) in enumerate(minis, 1):

        def gradient(limits: BatchLimits, mini: list[int] = mini) -> MiniBatchResult:
            optimizer.zero_grad()
            return backward(base, rollout, mini, targets, settings, limits, optimizer.loss_scale, critic_alone)

        part = ladder.update(gradient, progress.message)
        _take_in(result, part, epoch)
        optimizer.leave_out(still)
        if done > 1 and not critic_alone and _too_far(part, settings):
            progress.message(f"epoch {epoch + 1}: approx_kl is above 1.5 times ppo.target_kl; the step ends here")
            break
        result.grad_norm = optimizer.step(part.loss, logits=part.entropy)
        base.adapters_changed()
        progress.phase("update", done, len(minis))
    result.loss /= done
    optimizer.drop_gradients()
    return result


def _too_far(part: MiniBatchResult, settings: PPOSettings) -> bool:
    """Whether the policy is so far from the one that sampled that the epochs end."""
    limit = settings.target_kl
    return limit is not None and part.stats.metrics()["policy/approx_kl"] > 1.5 * limit


def _take_in(result: UpdateResult, part: MiniBatchResult, epoch: int) -> None:
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
    rollout: Rollout,
    rows: Sequence[int],
    targets: Targets,
    settings: PPOSettings,
    limits: BatchLimits,
    loss_scale: float = 1.0,
    critic_alone: bool = False,
) -> MiniBatchResult:
    """Add the gradient of a mini-batch's loss to the adapters': policy, value and entropy terms.

    ``policy / its tokens + vf_coef * value / its positions - entropy_coef * entropy / its tokens``.
    """
    return _MiniBatch(base, rollout, rows, targets, settings, limits, loss_scale).backward(critic_alone)


class _MiniBatch:
    """One mini-batch's passes; see `backward` for the arguments."""

    def __init__(
        self,
        base: SharedBase,
        rollout: Rollout,
        rows: Sequence[int],
        targets: Targets,
        settings: PPOSettings,
        limits: BatchLimits,
        loss_scale: float,
    ) -> None:
        self.base, self.targets, self.settings = base, targets, settings
        self.limits, self.loss_scale = limits, loss_scale
        self.groups, self.completions = rollout.groups(rows), len(rows)
        self.tokens = sum(len(rollout.completions[row].ids) for row in rows)
        self.positions = 0 if targets.returns is None else sum(len(targets.returns[row]) for row in rows)
        self.result, self.sums = MiniBatchResult(), DeviceSums()

    def backward(self, critic_alone: bool) -> MiniBatchResult:
        base, targets = self.base, self.targets
        if critic_alone:
            self._critic_passes(gradient=base.roles[CRITIC] != base.roles[POLICY])
            return self._read()
        shared = base.roles.get(CRITIC) == base.roles[POLICY] and targets.returns is not None
        one_pass = shared and not targets.bootstrap_position
        with base.role(POLICY):
            for packed in micro_batches(base, self.groups, self.limits.micro_batch_tokens):
                states = base.states(packed).index_select(0, packed.predict)
                loss = self._policy_term(states, packed)
                if one_pass:
                    loss = loss + self._value_term(states, packed)
                self._accumulate(loss, packed)
                del states, loss  # they hold the policy's 16-bit adapters, which the critic's pass has no use for
        if targets.returns is not None and not one_pass:
            self._critic_passes()
        return self._read()

    def _read(self) -> MiniBatchResult:
        result, world = self.result, current()
        for name, value in self.sums.read().items():
            setattr(result, name, value)
        if world.several:
            result.stats = merged(world.gather(result.stats.read()))
            result.scored, result.tokens = map(int, world.sum(result.scored, result.tokens))
        return result

    def _critic_passes(self, gradient: bool = True) -> None:
        """Run the critic's own passes; without ``gradient`` what is below its head does not learn."""
        base = self.base
        groups = with_bootstrap_position(self.groups) if self.targets.bootstrap_position else self.groups
        with base.role(CRITIC):
            for packed in micro_batches(base, groups, self.limits.micro_batch_tokens):
                with torch.set_grad_enabled(gradient):
                    states = base.states(packed).index_select(0, packed.predict)
                self._accumulate(self._value_term(states, packed), packed)

    def _accumulate(self, loss: torch.Tensor, packed: PackedBatch) -> None:
        (loss * self.loss_scale).backward()
        self.result.tokens += packed.input_ids.numel()

    def _policy_term(self, states: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """Return the micro-batch's share of the policy's loss, and of the entropy's."""
        targets, result, coefficient = self.targets, self.result, self.settings.entropy_coef
        kind: Entropy = "gradient" if coefficient else "value"
        logps, entropies = tiled_logprobs(
            states, packed.targets, self.base.head, self.limits.temperature, self.limits.tile, kind
        )  # (S,)
        old = torch.cat([targets.old_logps[row] for row in packed.rows])
        advantages = torch.cat([targets.advantages[row] for row in packed.rows])
        if targets.by_sequence:
            logps, old = _sums(logps, packed), _sums(old, packed)
        clipped = policy_loss(logps, old, advantages, self.settings.cliprange)
        loss = clipped.loss.sum() / (self.completions if targets.by_sequence else self.tokens)
        if coefficient:
            loss = loss - coefficient * entropies.sum() / self.tokens
        result.stats.add(clipped)
        result.scored += packed.targets.numel()
        self.sums.add(entropy=entropies.detach().sum(), loss=loss)
        return loss

    def _value_term(self, states: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """Return the micro-batch's share of the critic's loss."""
        targets = self.targets
        assert targets.returns is not None and targets.old_values is not None
        values = self.base.outputs(CRITIC, states).split(packed.lengths)
        returns = [targets.returns[row] for row in packed.rows]
        valued = torch.cat([value[: len(one)] for value, one in zip(values, returns, strict=True)])  # (S',)
        old = torch.cat([targets.old_values[row] for row in packed.rows])
        clipped = value_loss(valued, old, torch.cat(returns), self.settings.cliprange_value)
        loss = self.settings.vf_coef * clipped.loss.sum() / self.positions
        self.result.stats.add_value(clipped)
        self.sums.add(loss=loss)
        return loss


def _sums(values: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """Return the sums over the tokens of each completion."""
    return torch.stack([one.sum() for one in values.split(packed.lengths)])
