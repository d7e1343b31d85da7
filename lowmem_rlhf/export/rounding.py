"""How much of a change survives rounding. RL changes weights so little that bfloat16 drops most of it.

With ``W`` the base's weights, ``d`` their change and ``e = round(W + d) - round(W)``:

    kept = <e, d> / (|d| max(|d|, |e|))

It is the projection of e on d, or, where rounding moves the weights more than the change does, the cosine of both: 1
when all of the change is stored, 0 when it fell below the dtype's precision or drowned in the base's rounding.
"""

from dataclasses import dataclass

import torch

from lowmem_rlhf.errors import RunError

ENOUGH = 0.8  # of the change: what a 16-bit dtype must keep to be chosen, and bfloat16 to be allowed
LOST = 0.25  # of the change: an export that keeps less has lost the adapter


class DoesNotFit(Exception):
    """A weight is larger than the largest number of the dtype."""


@dataclass
class RoundingStats:
    """Sums over the changed weights: <e, d>, <d, d>, <e, e> and <W, W>."""

    both: float = 0.0
    change: float = 0.0
    stored: float = 0.0
    weights: float = 0.0

    @property
    def share(self) -> float:
        """The share of the change that is kept; 1 where nothing changed."""
        return self.both / (self.change * max(self.change, self.stored)) ** 0.5 if self.change else 1.0

    @property
    def relative_change(self) -> float:
        """The size of the change relative to the weights that it is added to, ``|d| / |W|``."""
        return (self.change / self.weights) ** 0.5 if self.weights else 0.0

    def add(self, weights: torch.Tensor, change: torch.Tensor, e: torch.Tensor) -> None:
        """Take in fp32 pieces of equal shape."""
        w, d, e = weights.reshape(-1), change.reshape(-1), e.reshape(-1)  # GPT-2's lie the other way round
        self.both += float(torch.dot(e, d))
        self.change += float(torch.dot(d, d))
        self.stored += float(torch.dot(e, e))
        self.weights += float(torch.dot(w, w))


def rounded_sum(
    base: torch.Tensor, change: torch.Tensor | None, dtype: torch.dtype, stats: RoundingStats, name: str
) -> torch.Tensor:
    """Return base plus change, rounded once, and add to ``stats`` what is kept of the change.

    Args:
        base: rows of a weight, in any floating-point dtype.
        change: of the same shape, fp32, or None.

    Raises:
        DoesNotFit: a sum is too large for the dtype.
        RunError: the base holds a number that is not finite.
    """
    if change is None and base.dtype == dtype:
        return base
    exact = base.float()
    if change is None:
        result = exact.to(dtype)
    else:
        e = -exact.to(dtype).float()
        result = (exact + change).to(dtype)
        stats.add(exact, change, e.add_(result))
    if not torch.isfinite(result.sum(dtype=torch.float32)):  # one number that is not spoils the sum
        if torch.isfinite(exact).all() and not torch.isfinite(result).all():
            raise DoesNotFit(name)
        if not torch.isfinite(exact).all():
            raise RunError(f"the base's {name} holds numbers that are not finite; fetch the model again")
    return result
