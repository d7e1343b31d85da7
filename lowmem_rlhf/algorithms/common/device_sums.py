"""Sums over micro-batches of numbers on the device, which nobody waits for before all are read."""

from collections.abc import Mapping, Sequence

import torch

from lowmem_rlhf.processes.world import current


class DeviceSums:
    """Sums by name."""

    def __init__(self) -> None:
        self._added: dict[str, list[torch.Tensor]] = {}

    def add(self, **numbers: torch.Tensor) -> None:
        """Add one number to each sum: tensors of one element."""
        for name, number in numbers.items():
            self._added.setdefault(name, []).append(number.detach())

    def read(self) -> dict[str, float]:
        """Wait for the device; return each sum, added up in Python's floats in the order of `add`.

        Among several processes, of all their micro-batches.
        """
        together: dict[torch.dtype, list[torch.Tensor]] = {}
        for numbers in self._added.values():
            for number in numbers:
                together.setdefault(number.dtype, []).append(number)
        values = {dtype: iter(torch.stack(numbers).tolist()) for dtype, numbers in together.items()}
        sums: dict[str, float] = {}
        for name, numbers in self._added.items():
            for number in numbers:
                sums[name] = sums.get(name, 0.0) + next(values[number.dtype])
        return added_up(current().gather(sums))


def added_up(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the sum of each name over the parts that have it."""
    if len(parts) == 1:
        return dict(parts[0])
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}
