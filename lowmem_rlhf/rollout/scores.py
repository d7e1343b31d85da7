"""What rewards say of the completions of a rollout. Loads without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scores:
    """The rewards of N completions."""

    by_name: dict[str, list[float | None]]  # per function, N values; None: it does not apply to that completion
    total: list[float]  # (N,) weighted sums, which are learned from; NaN where no function applies
    metrics: dict[str, float] = field(default_factory=dict)  # means of what functions reported with TRL's log_metric
    extra: dict[str, list[Any]] = field(default_factory=dict)  # columns they reported with TRL's log_extra
    # per function whose on_error is not fail, the completions that have no value for an error, and for the time limit
    failures: dict[str, tuple[int, int]] = field(default_factory=dict)
    raw: list[float] | None = None  # (N,) as `total`, of values that are not normalised; None: those of `total`

    @property
    def raw_total(self) -> list[float]:
        """The weighted sums (N,) of the values that the functions gave, for metrics."""
        return self.total if self.raw is None else self.raw

    def of_rows(self, rows: Sequence[int]) -> "Scores":
        """Return the values of these completions, without what functions reported or failed at."""
        by_name = {name: [values[n] for n in rows] for name, values in self.by_name.items()}
        raw = None if self.raw is None else [self.raw[n] for n in rows]
        return Scores(by_name, [self.total[n] for n in rows], raw=raw)


def joined(parts: Sequence[tuple[Sequence[int], Scores]]) -> Scores:
    """Return the scores of all completions from those of parts of them, given with their rows.

    A reward that a part does not have is None there. What functions reported under one name is averaged over the parts
    by their completions.
    """
    count = sum(len(rows) for rows, _ in parts)
    joint = Scores({}, [0.0] * count, raw=[0.0] * count)
    assert joint.raw is not None
    reported: dict[str, list[tuple[float, int]]] = {}
    for rows, scores in parts:
        for name, values in scores.by_name.items():
            _place(joint.by_name.setdefault(name, [None] * count), rows, values)
        for name, extra in scores.extra.items():
            if len(extra) == len(rows):
                _place(joint.extra.setdefault(name, [None] * count), rows, extra)
        for name, value in scores.metrics.items():
            reported.setdefault(name, []).append((value, len(rows)))
        for name, failed in scores.failures.items():
            before = joint.failures.get(name, (0, 0))
            joint.failures[name] = (before[0] + failed[0], before[1] + failed[1])
        _place(joint.total, rows, scores.total)
        _place(joint.raw, rows, scores.raw_total)
    for name, means in reported.items():
        joint.metrics[name] = sum(value * rows for value, rows in means) / sum(rows for _, rows in means)
    return joint


def _place(into: list[Any], rows: Sequence[int], values: Sequence[Any]) -> None:
    for row, value in zip(rows, values, strict=True):
        into[row] = value
