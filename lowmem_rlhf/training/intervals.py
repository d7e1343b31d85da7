"""Estimates from held-out problems and their 95 % intervals. Problems are drawn, answers to one hang together.

Two kinds of quantity, both over P problems that have several values each:

- A share (every value is 0 or 1, or a probability such as pass@k): Wilson's interval with the effective number of
  trials, which is P for one answer a problem and grows as far as the answers to one problem differ (Franco, Little,
  Louis and Slud 2019, "Comparative study of confidence intervals for proportions in complex sample surveys"). It says
  something at 0 of P, where a bootstrap does not. The difference of two shares on the same problems is Newcombe's
  method 10 (1998), which joins the two intervals through their correlation (MOVER, Zou and Donner 2008).
- Any other mean: the percentile bootstrap over problems; a difference uses the same resampled problems on both sides.
  With fewer than about 20 problems it is too narrow.

What is left out: a correction for reading several quantities at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 4000
_CHUNK = 500  # resamples at once
METHOD = (
    "95 % intervals over problems: Wilson's with the effective number of trials for shares (their difference by "
    "Newcombe's method 10), else the percentile bootstrap; differences are paired"
)


@dataclass(frozen=True)
class Column:
    """One quantity on P problems.

    Attributes:
        sums: (P,) sum of a problem's values.
        counts: (P,) how many they are; 0: the problem has none.
        share: the values lie between 0 and 1 and the mean is a share of them.
        trials: the most independent trials that a share may count as; 0: as many as there are values.
    """

    sums: Floats
    counts: Floats
    share: bool = False
    trials: int = 0

    @property
    def means(self) -> Floats:
        """(P,) a problem's mean, NaN where it has no value."""
        return np.divide(self.sums, self.counts, out=np.full_like(self.sums, np.nan), where=self.counts > 0)


def joined_columns(columns: Sequence[Column | None], problems: Sequence[int]) -> Column:
    """Return one quantity on the problems of all columns; None: the quantity has no value for so many problems."""
    known = [column for column in columns if column is not None]
    filled = [column or Column(np.zeros(n), np.zeros(n)) for column, n in zip(columns, problems, strict=True)]
    trials = sum(column.trials or int(column.counts.sum()) for column in known)
    return Column(
        np.concatenate([column.sums for column in filled]),
        np.concatenate([column.counts for column in filled]),
        all(column.share for column in known),
        trials if any(column.trials for column in known) else 0,
    )


def joined(parts: Sequence[dict[str, Column]], problems: Sequence[int]) -> dict[str, Column]:
    """Return the quantities of several sets of problems, given with their sizes, on all of them."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: joined_columns([part.get(name) for part in parts], problems) for name in names}


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; the bounds are None where one problem is all there is."""

    value: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"value": self.value, "low": self.low, "high": self.high}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that one of k answers is correct, given that c of n were.

    Unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is more than n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} of {n} answers, {c} correct")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(p: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share p of n trials (n need not be whole)."""
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def effective_trials(column: Column) -> float:
    """Return the trials n for which p (1 - p) / n is the variance of the share, estimated between problems."""
    weights = column.counts / column.counts.sum()
    answered = column.counts > 0
    p = float(column.sums.sum() / column.counts.sum())
    variance = float((weights[answered] ** 2 * (column.means[answered] - p) ** 2).sum())
    least = 1.0 / float((weights**2).sum())  # as if all answers to a problem were one
    most = float(column.trials or column.counts.sum())
    if p * (1 - p) < 1e-12:
        return least
    return max(least, min(most, p * (1 - p) / variance if variance > 0 else most))


def estimates(columns: dict[str, Column]) -> dict[str, Estimate]:
    """Return the estimate of every quantity that has a value."""
    columns = {name: column for name, column in columns.items() if column.counts.sum() > 0}
    draws = resampled({name: column for name, column in columns.items() if not column.share})
    return {name: _estimate(column, draws.get(name)) for name, column in columns.items()}


def bounds(columns: dict[str, Column]) -> dict[str, list[float]]:
    """Return ``[low, high]`` of every quantity that has an interval."""
    found = estimates(columns).items()
    return {name: [one.low, one.high] for name, one in found if one.low is not None and one.high is not None}


def perplexity(loss: float) -> float:
    """Return the exponential of a loss; of one above 700 that of 700, which is near the largest number."""
    return math.exp(min(loss, 700.0))


def with_perplexity(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return intervals with that of the perplexity, where there is one of the loss."""
    return {**found, "perplexity": [perplexity(bound) for bound in found["loss"]]} if "loss" in found else found


def _estimate(column: Column, drawn: Floats | None) -> Estimate:
    value = float(column.sums.sum() / column.counts.sum())
    if drawn is None:
        return Estimate(value, *wilson(min(1.0, max(0.0, value)), effective_trials(column)))
    return Estimate(value, *_percentiles(drawn, column))


def differences(first: dict[str, Column], second: dict[str, Column]) -> dict[str, Estimate]:
    """Return by how much ``second`` is above ``first``, on the same P problems, for every quantity that both have."""
    names = [n for n in first if n in second and first[n].counts.sum() > 0 and second[n].counts.sum() > 0]
    shares = {name for name in names if first[name].share and second[name].share}
    one = resampled({name: first[name] for name in names if name not in shares})
    two = resampled({name: second[name] for name in names if name not in shares})
    compared = {}
    for name in names:
        a, b = first[name], second[name]
        if name in shares:
            compared[name] = _difference_of_shares(a, b)
        else:
            value = float(b.sums.sum() / b.counts.sum() - a.sums.sum() / a.counts.sum())
            compared[name] = Estimate(value, *_percentiles(two[name] - one[name], a))
    return compared


def _difference_of_shares(first: Column, second: Column) -> Estimate:
    """Newcombe's method 10: the two Wilson intervals, joined through the correlation of the problems' shares."""
    a, b = _estimate(first, None), _estimate(second, None)
    both = (first.counts > 0) & (second.counts > 0)
    x, y = first.means[both], second.means[both]
    spread = float(x.std() * y.std()) if len(x) else 0.0
    r = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0 else 0.0
    assert a.low is not None and a.high is not None and b.low is not None and b.high is not None
    down, up = b.value - b.low, b.high - b.value
    a_down, a_up = a.value - a.low, a.high - a.value
    value = b.value - a.value
    low = value - math.sqrt(max(0.0, down**2 - 2 * r * down * a_up + a_up**2))
    high = value + math.sqrt(max(0.0, up**2 - 2 * r * up * a_down + a_down**2))
    return Estimate(value, low, high)


def resampled(columns: dict[str, Column], seed: int = 0) -> dict[str, Floats]:
    """Return (RESAMPLES,) means of each quantity on resampled problems; NaN where a resample has no value.

    Quantities on equally many problems see the same resamples, in this call and in any other with this seed.
    """
    if not columns:
        return {}
    table = np.stack([part for c in columns.values() for part in (c.sums, c.counts)], axis=1)  # (P, 2 * quantities)
    problems = len(table)
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, RESAMPLES, _CHUNK):
        rows = min(_CHUNK, RESAMPLES - start)
        drawn = generator.integers(0, problems, (rows, problems))
        places = drawn + problems * np.arange(rows)[:, None]
        times = np.bincount(places.ravel(), minlength=rows * problems).reshape(rows, problems)  # (rows, P)
        parts.append(times @ table)
    sums, counts = np.concatenate(parts)[:, ::2], np.concatenate(parts)[:, 1::2]
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return {name: means[:, i] for i, name in enumerate(columns)}


def _percentiles(drawn: Floats, column: Column) -> tuple[float | None, float | None]:
    if (column.counts > 0).sum() < 2:
        return None, None
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)
