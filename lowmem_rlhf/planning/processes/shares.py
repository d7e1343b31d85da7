"""How work is shared out among processes of unlike speed. No torch."""

import math
from collections.abc import Sequence


def proportions(speeds: Sequence[float]) -> list[float]:
    """Return the share of a step's tokens that each process takes, so that all are done at once; they sum to 1.

    Args:
        speeds: predicted tokens a second, by process.

    Raises:
        ValueError: there is none, or one is not positive.
    """
    if not speeds or not all(speed > 0 and math.isfinite(speed) for speed in speeds):
        raise ValueError(f"speeds are positive numbers, one for each process, and not {list(speeds)}")
    total = sum(speeds)
    return [speed / total for speed in speeds]


def whole_shares(count: int, shares: Sequence[float]) -> list[int]:
    """Return how many of ``count`` equal pieces each process takes; a piece, such as a group, is not cut.

    One after another goes to the process that would be done with it first, to the earlier one of two; nothing makes the
    last one done sooner. A process may get none.

    Args:
        shares: of each process, as `proportions` gives them.
    """
    taken = [0] * len(shares)
    for _ in range(count):
        first = min(range(len(shares)), key=lambda process: ((taken[process] + 1) / shares[process], process))
        taken[first] += 1
    return taken
