"""How work is shared out among processes: in order, so that each one's part is a range, and by what it costs.

The plan of several processes and the run ask the same functions. No torch.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


def shared_out(costs: Sequence[float], proportions: Sequence[float]) -> list[range]:
    """Return the places of each process's items, in order; where there are few items some processes get none.

    An item goes to the process in whose part of the whole cost its middle lies, so that each process is within half an
    item of its proportion at both ends.

    Args:
        costs: of each item (tokens), not negative.
        proportions: what each process should get of the whole cost; they sum up to 1.
    """
    whole, number = sum(costs), len(proportions)
    if not whole:  # items without a cost count alike
        costs, whole = [1] * len(costs), len(costs)
    ends = [share * whole for share in accumulate(proportions)]
    before, places = 0.0, []
    for cost in costs:
        places.append(min(bisect_right(ends, before + cost / 2), number - 1))
        before += cost
    starts = [sum(place < process for place in places) for process in range(number + 1)]
    return [range(starts[process], starts[process + 1]) for process in range(number)]


def whole_shared_out(costs: Sequence[float], proportions: Sequence[float]) -> list[range]:
    """Return the places of each process's items as `shared_out`, where a process does not wait for half an item.

    Items are few and large here, such as groups that stay whole: of equal ones each process gets as many as
    `whole_shares` says, and unequal ones are divided by their costs in these parts.
    """
    counts = whole_shares(len(costs), proportions)
    return shared_out(costs, [count / max(1, len(costs)) for count in counts])


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


def even(number: int) -> tuple[float, ...]:
    """Return the proportions of processes that are equally fast."""
    return (1 / number,) * number
