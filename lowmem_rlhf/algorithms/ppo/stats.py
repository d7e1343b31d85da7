"""What an update did, added up over its micro-batches: means over real tokens, in float64, whatever the split."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from lowmem_rlhf.algorithms.ppo.math import PolicyLoss, ValueLoss


@dataclass
class PPOStatistics:
    """Sums over the tokens of micro-batches, and the metrics that they give.

    Attributes:
        tokens: tokens of the policy's loss so far.
        value_tokens: positions of the value loss so far; 0 for an algorithm without a critic.
    """

    tokens: int = 0
    value_tokens: int = 0
    _policy: list[float] = field(default_factory=lambda: [0.0] * 6)
    _ratios: tuple[float, float] = (math.inf, -math.inf)
    _value: list[float] = field(default_factory=lambda: [0.0] * 2)
    _unread: list[torch.Tensor] = field(default_factory=list)  # of micro-batches: sums, and the ratio's range
    _unread_values: list[torch.Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, policy: PolicyLoss, value: ValueLoss | None = None) -> None:
        """Take in a micro-batch of at least one token; nothing waits for the device before it is read."""
        off = policy.ratio.double() - 1  # from 1, so that the square keeps its digits
        sums = [policy.loss, policy.approx_kl, policy.approx_kl_k3, policy.clipped, off, off.square()]
        self._unread.append(torch.stack([x.double().sum() for x in sums] + list(policy.ratio.double().aminmax())))
        self.tokens += len(policy.loss)
        if value:
            self.add_value(value)

    @torch.no_grad()
    def add_value(self, value: ValueLoss) -> None:
        """Take in the value loss of a micro-batch, which may be another one than the policy's."""
        self._unread_values.append(torch.stack([value.loss.double().sum(), value.clipped.double().sum()]))
        self.value_tokens += len(value.loss)

    def read(self) -> "PPOStatistics":
        """Wait for the device and add up what was taken in; return itself, without a tensor."""
        for totals in torch.stack(self._unread).tolist() if self._unread else []:
            self._policy = [a + b for a, b in zip(self._policy, totals[:-2], strict=True)]
            self._ratios = min(self._ratios[0], totals[-2]), max(self._ratios[1], totals[-1])
        for totals in torch.stack(self._unread_values).tolist() if self._unread_values else []:
            self._value = [a + b for a, b in zip(self._value, totals, strict=True)]
        self._unread.clear()
        self._unread_values.clear()
        return self

    def merge(self, other: "PPOStatistics") -> None:
        """Take in what another one has taken in."""
        self.read()
        other.read()
        self.tokens, self.value_tokens = self.tokens + other.tokens, self.value_tokens + other.value_tokens
        self._policy = [a + b for a, b in zip(self._policy, other._policy, strict=True)]
        self._value = [a + b for a, b in zip(self._value, other._value, strict=True)]
        self._ratios = min(self._ratios[0], other._ratios[0]), max(self._ratios[1], other._ratios[1])

    def metrics(self) -> dict[str, float]:
        """Return means over all tokens taken in, and the ratio's deviation and range; nothing if there were none."""
        self.read()
        means: dict[str, float] = {}
        if self.tokens:
            loss, approx_kl, approx_kl_k3, clipped, off, squares = (x / self.tokens for x in self._policy)
            means = {
                "policy/loss": loss,
                "policy/approx_kl": approx_kl,
                "policy/approx_kl_k3": approx_kl_k3,
                "policy/clip_fraction": clipped,
                "policy/ratio_mean": 1 + off,
                "policy/ratio_std": math.sqrt(max(squares - off**2, 0.0)),
                "policy/ratio_min": self._ratios[0],
                "policy/ratio_max": self._ratios[1],
            }
        if self.value_tokens:
            loss, clipped = (x / self.value_tokens for x in self._value)
            means |= {"value/loss": loss, "value/clip_fraction": clipped}
        return means


def merged(parts: Iterable[PPOStatistics]) -> PPOStatistics:
    """Return one of what all of these have taken in."""
    whole = PPOStatistics()
    for part in parts:
        whole.merge(part)
    return whole
