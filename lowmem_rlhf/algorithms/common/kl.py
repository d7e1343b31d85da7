"""Estimates of the KL divergence from sampled tokens, and what sets its coefficient.

k1 and k3 are Schulman's names ("Approximating KL Divergence", joschu.net/blog/kl-approx.html). The adaptive
coefficient is that of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2).
"""

import math
from dataclasses import dataclass

import torch


def k1(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """Return ``logp - ref`` for each token: unbiased for tokens sampled from the policy, may be negative. Nats."""
    return logps - ref_logps


def k3(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """Return ``exp(ref - logp) - (ref - logp) - 1`` for each token: unbiased too, never negative. Nats."""
    difference = ref_logps - logps
    return difference.exp() - difference - 1


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, kl_estimator: str) -> torch.Tensor:
    """Return the estimate of that name for each token, in the shape of the log-probs.

    Raises:
        ValueError: the name is neither ``k1`` nor ``k3``.
    """
    if kl_estimator == "k1":
        return k1(logps, ref_logps)
    if kl_estimator == "k3":
        return k3(logps, ref_logps)
    raise ValueError(f"kl_estimator: got {kl_estimator!r}; allowed are k1 and k3")


@dataclass
class FixedKLController:
    """A coefficient that stays; it has what the adaptive one has, so that a loop need not ask which it holds."""

    value: float

    def update(self, current: float, n_steps: int) -> None:
        """Change nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps, as JSON has it."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's state."""
        self.value = float(state["value"])


@dataclass
class AdaptiveKLController(FixedKLController):
    """A coefficient that grows while the divergence is above its target and shrinks while it is below.

    ``value *= 1 + clip(current / target - 1, -0.2, 0.2) * n_steps / horizon``, as in Ziegler et al. and old TRL.

    Attributes:
        value: the coefficient, at first ``init_kl_coef``.
        target: nats a completion (Ziegler et al.: 6).
        horizon: completions over which an error of 20 % changes the coefficient by about 20 % (old TRL: 10000).

    Raises:
        ValueError: target or horizon is not positive; in an update, the divergence is not finite or the batch has more
            completions than the horizon.
    """

    target: float
    horizon: float

    def __post_init__(self) -> None:
        if self.target <= 0 or self.horizon <= 0:
            raise ValueError(f"adaptive KL: got target {self.target} and horizon {self.horizon}; both must be above 0")

    def update(self, current: float, n_steps: int) -> None:
        """Adapt to a batch.

        Args:
            current: mean over completions of the sum over tokens of the KL estimate, nats.
            n_steps: completions of the batch (N).
        """
        if not math.isfinite(current):
            raise ValueError(f"adaptive KL: got a divergence of {current}; it must be a finite number of nats")
        if n_steps > self.horizon:
            raise ValueError(
                f"adaptive KL: got {n_steps} completions for a horizon of {self.horizon}; raise the horizon"
            )
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon
