"""The time that a run of ``bench`` may take, and the bar that shows where it is. No torch here."""

import time
from collections.abc import Callable

from lowmem_rlhf.bench.parts import Part
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.progress import current

MOST = 24 * 60.0  # minutes
NAME = "bench, seconds"  # one for all parts: the bar's time left is then that of the whole run


class Budget:
    """Seconds that begin to run when it is made.

    Args:
        minutes: in all.
        clock: seconds that pass.

    Raises:
        UserError: this is no amount of time.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 < minutes <= MOST:
            raise UserError(f"--minutes: got {minutes:g}; give minutes above 0 and at most {MOST:.0f}, such as 8")
        self.minutes, self._clock, self._began = minutes, clock, clock()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def left(self) -> float:
        """Seconds until the end; below 0 after it."""
        return 60 * self.minutes - self.spent

    def why_not(self, part: Part, device: Device) -> str:
        """Return why there is no time for a part; an empty text where there is."""
        need = part.seconds(device) if part.least is None else part.least
        if need <= self.left:
            return ""
        return f"it takes about {need:.0f} s, and {max(0.0, self.left):.0f} s of {self.minutes:g} minutes are left"


class Bar:
    """How far a run is, on the current display, in the seconds that its work takes roughly."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._all, self._done, self._clock = seconds, 0.0, clock
        self._part, self._began = 0.0, clock()

    def begin(self, seconds: float) -> None:
        """Begin work of so many seconds."""
        self._part, self._began = seconds, self._clock()
        self.tick(0.0)

    def tick(self, share: float) -> None:
        """Show that time goes by, and that at least this share of the work that was begun is done."""
        most = 0.99 * self._part  # a bar that is full does not come back
        done = min(most, max(self._clock() - self._began, share * self._part))
        current().phase(NAME, int(self._done + done), max(1, int(self._all)))

    def end(self) -> None:
        """Count the work that was begun as done."""
        self._done, self._part = self._done + self._part, 0.0
        self.tick(0.0)

    def leave_out(self, seconds: float) -> None:
        """Do without work of so many seconds."""
        self._all -= seconds
