"""Time and peak live bytes of the phases of a step."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowmem_rlhf.hardware.live_bytes import LiveBytes
from lowmem_rlhf.hardware.memory import clock


class Meter:
    """Charges time, and with a counter the peak of live bytes, to the innermost phase that is open.

    Attributes:
        seconds: by phase, without the phases inside it.
        peaks: bytes, the same way; empty without a counter.
    """

    def __init__(self, device: torch.device, counter: LiveBytes | None = None) -> None:
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
