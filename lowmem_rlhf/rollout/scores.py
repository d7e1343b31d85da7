"""What rewards say of the completions of a rollout. Loads without torch."""

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
