"""Time and peak bytes of the phases of a step."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.hardware.memory import clock, device_counter, peak_bytes, reset_peak


class Counter(Protocol):
    """What counts bytes while it is entered."""

    @property
    def current(self) -> int:
        """Bytes that are live now."""
        ...

    @property
    def peak(self) -> int:
        """The most since `reset_peak`."""
        ...

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...

    def reset_peak(self) -> None:
        """Begin a new peak."""
        ...


class AllocatedBytes:
    """The counts of a card's own allocator, as a `Counter`; they cost nothing, and see what graphs replay.

    Attributes:
        reserved: the most that the allocator had of the device, up to the last reading; 0 where it does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.reserved = device, 0

    def __enter__(self) -> "AllocatedBytes":
        self.reset_peak()
        return self

    def __exit__(self, *error: Any) -> None:
        self._read_reserved()

    @property
    def current(self) -> int:
        """Bytes of live tensors, as the allocator rounds them."""
        count = device_counter(self._device, "memory_allocated")
        return int(count(self._device)) if count else 0

    @property
    def peak(self) -> int:
        """The most of these since `reset_peak`."""
        return peak_bytes(self._device)

    def reset_peak(self) -> None:
        """Begin a new peak at what is allocated now."""
        self._read_reserved()
        reset_peak(self._device)

    def _read_reserved(self) -> None:
        if count := device_counter(self._device, "max_memory_reserved"):
            self.reserved = max(self.reserved, int(count(self._device)))


def counter_for(device: torch.device) -> Counter:
    """Return what counts on a device: its allocator where that tells, else the live tensors themselves."""
    return AllocatedBytes(device) if capabilities(device).counts_memory else LiveBytes()


class Meter:
    """Charges time, and with a counter the peak of live bytes, to the innermost phase that is open.

    Attributes:
        seconds: by phase, without the phases inside it.
        peaks: bytes, the same way; empty without a counter.
    """

    def __init__(self, device: torch.device, counter: Counter | None = None) -> None:
        self.device, self.counter = device, counter
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = defaultdict(int)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Be in a phase inside the block."""
        self._close()
        self._open.append(name)
        try:
            yield
        finally:
            self._close()
            self._open.pop()

    def _close(self) -> None:
        """Charge what happened since the last change to the phase that was open."""
        now = clock(self.device)
        if self._open:
            name = self._open[-1]
            self.seconds[name] += now - self._since
            if self.counter:
                self.peaks[name] = max(self.peaks[name], self.counter.peak)
        if self.counter:
            self.counter.reset_peak()
        self._since = now
