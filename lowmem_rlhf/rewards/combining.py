"""One reward of several: gates, normalisation of each, and the weighted sum."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.rewards.loading import Reward

Values = Sequence[float | None]  # (N,) of one reward; None: it does not apply

_EPSILON = 1e-4  # added to a standard deviation, as by GRPO's advantages and in TRL
_LARGEST_TOTAL = 1e18  # its square, of which advantages are made, is still one of float32


def counted(rewards: Sequence[Reward], by_name: Mapping[str, Values]) -> dict[str, Values]:
    """Return the values that count: None where a gate (`requires`) is closed.

    A gate is open where the value of the reward that it names counts itself and is above 0, or reaches its threshold;
    a value of None opens none.

    Args:
        rewards: whose gates name each other without a circle (the recipe's schema sees to it).
        by_name: their raw values.
    """
    gates = {reward.name: reward.requires for reward in rewards}

    @cache
    def of(name: str) -> Values:
        values = by_name[name]
        for other, threshold in gates[name].items():
            values = [v if _reaches(gate, threshold) else None for v, gate in zip(values, of(other), strict=True)]
        return values

    return {name: of(name) for name in by_name}


def _reaches(value: float | None, threshold: float | None) -> bool:
    return value is not None and (value > 0 if threshold is None else value >= threshold)


def standardized(values: Values, size: int) -> list[float | None]:
    """Return values less their mean, over their standard deviation (of n - 1) plus 1e-4, in each group by itself.

    GDPO's normalisation (arXiv 2601.05242), TRL's ``normalize_then_sum``. None stays None and is left out of mean and
    deviation; equal values, and one alone, become exactly 0.

    Args:
        values: (N,), those of a group together.
        size: of a group; N for all at once.
    """
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [value for group in groups for value in _standardized(group)]


def _standardized(values: Values) -> list[float | None]:
    known = [value for value in values if value is not None]
    if not known or min(known) == max(known):
        return [None if value is None else 0.0 for value in values]
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return [None if value is None else (value - mean) / (deviation + _EPSILON) for value in values]


def totals(
    rewards: Sequence[Reward], by_name: Mapping[str, Values], num_generations: int | None
) -> tuple[list[float], list[float]]:
    """Return the weighted sums (N,): what is learned from, and the same of raw values; NaN where no reward counts.

    Args:
        num_generations: completions of a prompt, which stand together; None: nothing is normalised.

    Raises:
        RunError: a sum of raw values is too large to learn from.
    """
    counting = counted(rewards, by_name)
    raw = _sums(rewards, counting)
    _check_totals(rewards, counting, raw)
    if num_generations is None or all(reward.normalize == "none" for reward in rewards):
        return raw, raw
    sizes = {"group": num_generations, "batch": len(raw)}
    learned = {
        one.name: standardized(counting[one.name], sizes[one.normalize])
        if one.normalize in sizes
        else counting[one.name]
        for one in rewards
    }
    return _sums(rewards, learned), raw


def _sums(rewards: Sequence[Reward], by_name: Mapping[str, Values]) -> list[float]:
    weights = [reward.weight for reward in rewards]
    return [_weighted(weights, row) for row in zip(*by_name.values(), strict=True)]


def _weighted(weights: list[float], row: tuple[float | None, ...]) -> float:
    parts = [weight * value for weight, value in zip(weights, row, strict=True) if value is not None]
    return math.fsum(parts) if parts else math.nan


def _check_totals(rewards: Sequence[Reward], by_name: Mapping[str, Values], total: list[float]) -> None:
    """Check that advantages can be made of the sums.

    Raises:
        RunError: one is too large.
    """
    for index, value in enumerate(total):
        if abs(value) > _LARGEST_TOTAL:
            largest = max(rewards, key=lambda one: abs(one.weight * (by_name[one.name][index] or 0.0)))
            raise RunError(
                f"the rewards of completion {index + 1} add up to {value:.3g}, most of it from {largest.name} (weight "
                f"{largest.weight:g}); advantages are computed in float32, which overflows beyond {_LARGEST_TOTAL:g}: "
                "give smaller values, or lower its weight"
            )
