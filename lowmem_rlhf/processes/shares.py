"""How work is shared out among processes: in order, so that each one's part is a range, and by what it costs."""

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


def even(number: int) -> tuple[float, ...]:
    """Return the proportions of processes that are equally fast."""
    return (1 / number,) * number
