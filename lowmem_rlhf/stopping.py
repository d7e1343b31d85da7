"""Being stopped from outside: Ctrl-C, `docker stop`, a batch system, a closed terminal take one path.

The first signal raises `Stopped` where the program stands; what runs then takes back what it has begun and saves. A
later one ends the process at once, unless it comes within a second or a closed terminal has sent it. The command line
installs the handlers; the library leaves signals alone.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))

# A terminal that closes sends more than one, from the shell and from the system, and nobody is left to be impatient.
_HANGUP = getattr(signal, "SIGHUP", None)
_SAME = 1.0  # seconds in which further signals belong to the first: some programs signal a process and its group

_received: int | None = None  # the first signal that was not dealt with yet
_at = 0.0  # when it came
_what_is_kept: Callable[[], str] | None = None


class Stopped(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
        signal: its number; the exit code is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code of a process that was stopped so: 130, 143 or 129."""
    return 128 + (error.signal if isinstance(error, Stopped) else signal.SIGINT)


def cause(error: KeyboardInterrupt) -> str:
    """Return what happened, in a word or two."""
    number = error.signal if isinstance(error, Stopped) else signal.SIGINT
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


def only_interrupted(error: KeyboardInterrupt) -> bool:
    """Whether it was Ctrl-C, which ends an answer of a chat and no more; it is dealt with then."""
    global _received
    if isinstance(error, Stopped) and error.signal != signal.SIGINT:
        return False
    _received = None
    return True


def check_stop() -> None:
    """Raise what a signal has raised before, where other code has swallowed it.

    Raises:
        Stopped: a signal arrived.
    """
    if _received is not None:
        raise Stopped(_received)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the signals raise `Stopped` inside the block; those that are ignored stay so. Main thread only."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _received = None
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, _on_signal)
    try:
        yield
    except OSError as error:  # a terminal that was closed cannot be written to
        if _received is None:
            raise
        raise Stopped(_received) from error
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, handler)
        _received = None


@contextmanager
def telling_what_is_kept(tell: Callable[[], str]) -> Iterator[None]:
    """Let a second signal inside the block say what is kept."""
    global _what_is_kept
    before, _what_is_kept = _what_is_kept, tell
    try:
        yield
    finally:
        _what_is_kept = before


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received, _at
    if _received is None:
        _received, _at = number, time.monotonic()
        raise Stopped(number)
    if number == _HANGUP or time.monotonic() - _at < _SAME:
        return
    with suppress(Exception):  # the terminal may be closed
        kept = f"; {_what_is_kept()}" if _what_is_kept else ""
        os.write(2, f"\n{cause(Stopped(number))} again{kept}\n".encode(errors="replace"))
    os._exit(128 + number)
