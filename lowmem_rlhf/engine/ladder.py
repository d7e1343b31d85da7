"""The ladder: sizes of passes and rollouts that shrink when the device's memory runs out, and stay so from then on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from lowmem_rlhf.engine.passes import BatchLimits
from lowmem_rlhf.hardware.memory import retry_with_smaller
from lowmem_rlhf.planning.memory.resident import Settings

T = TypeVar("T")

LEAST_TOKENS = 64  # a micro-batch never gets smaller; it holds one completion then


@dataclass(frozen=True)
class RolloutLimits:
    """What bounds a rollout's memory: completions at once, prompt tokens in one prefill, rows in one logits tile."""

    rows: int
    prefill_tokens: int
    tile: int


class Ladder:
    """The three sizes that shrink, made once from the settings of a plan and shared by all who work on one base.

    Work is given the limits of its turn. When the device's memory runs out the size is halved, which is said, and the
    work is done again; it must leave nothing behind when it fails. Whoever comes next starts with the smaller size.

    Args:
        device: whose memory it is.
        rollout_batch_size: completions sampled at once.
        micro_batch_tokens: tokens of a micro-batch with gradients; a prefill pass of a rollout has as many at most.
        score_batch_tokens: tokens of a micro-batch without gradients.
        logits_tile_tokens: positions of a logits tile, which does not shrink.
        temperature: at which the log-probs of passes are taken.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rollout_batch_size: int,
        micro_batch_tokens: int,
        score_batch_tokens: int,
        logits_tile_tokens: int,
        temperature: float = 1.0,
    ) -> None:
        self.device, self.temperature, self.tile = device, temperature, logits_tile_tokens
        self.prefill_tokens = micro_batch_tokens
        self.rollout_batch_size = rollout_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.score_batch_tokens = score_batch_tokens

    @classmethod
    def of(cls, settings: Settings, device: torch.device, temperature: float = 1.0) -> "Ladder":
        """Return the ladder of a plan's settings."""
        return cls(
            device,
            rollout_batch_size=settings.rollout_batch_size,
            micro_batch_tokens=settings.micro_batch_tokens,
            score_batch_tokens=settings.score_batch_tokens,
            logits_tile_tokens=settings.logits_tile_tokens,
            temperature=temperature,
        )

    def rollout(self, work: Callable[[RolloutLimits], T], say: Callable[[str], None]) -> T:
        """Sample completions, fewer at once when memory runs out.

        Args:
            say: is given the sentence that a size was halved.

        Raises:
            RunError: not even one completion at a time fits.
        """
        return self.run(
            "rollout_batch_size", lambda rows: work(RolloutLimits(rows, self.prefill_tokens, self.tile)), say
        )

    def update(self, work: Callable[[BatchLimits], T], say: Callable[[str], None]) -> T:
        """Run passes with gradients, cut into smaller micro-batches when memory runs out.

        Args:
            say: is given the sentence that a size was halved.

        Raises:
            RunError: not even the smallest micro-batch fits.
        """
        return self.run("micro_batch_tokens", lambda tokens: work(self._limits(tokens)), say)

    def score(self, work: Callable[[BatchLimits], T], say: Callable[[str], None]) -> T:
        """Run passes without gradients; as `update`, with the larger micro-batches that such passes take."""
        return self.run("score_batch_tokens", lambda tokens: work(self._limits(tokens)), say)

    def _limits(self, tokens: int) -> BatchLimits:
        return BatchLimits(self.temperature, tokens, self.tile)

    def run(self, key: str, work: Callable[[int], T], say: Callable[[str], None]) -> T:
        """Run ``work(size)`` with the size of this key, and keep the size that fitted.

        Args:
            key: ``rollout_batch_size``, ``micro_batch_tokens`` or ``score_batch_tokens``.
            say: is given the sentence that a size was halved.

        Raises:
            RunError: not even the least size fits.
        """
        least = 1 if key == "rollout_batch_size" else LEAST_TOKENS
        result, size = retry_with_smaller(work, getattr(self, key), least, f"hardware.{key}", self.device, say)
        setattr(self, key, size)
        return result
