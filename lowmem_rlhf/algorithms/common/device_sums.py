"""Sums over micro-batches of numbers on the device, which nobody waits for before all are read."""

import torch


class DeviceSums:
    """Sums by name."""

    def __init__(self) -> None:
        self._added: dict[str, list[torch.Tensor]] = {}

    def add(self, **numbers: torch.Tensor) -> None:
        """Add one number to each sum: tensors of one element."""
        for name, number in numbers.items():
            self._added.setdefault(name, []).append(number.detach())

    def read(self) -> dict[str, float]:
        """Wait for the device; return each sum, added up in Python's floats in the order of `add`."""
        together: dict[torch.dtype, list[torch.Tensor]] = {}
        for numbers in self._added.values():
            for number in numbers:
                together.setdefault(number.dtype, []).append(number)
        values = {dtype: iter(torch.stack(numbers).tolist()) for dtype, numbers in together.items()}
        sums: dict[str, float] = {}
        for name, numbers in self._added.items():
            for number in numbers:
                sums[name] = sums.get(name, 0.0) + next(values[number.dtype])
        return sums
