"""A time limit for one call of a user's function, and what happens where Python cannot interrupt it.

A thread watches the calls. In the main thread it sends SIGURG, whose handler raises; a signal also wakes what waits in
the system (``time.sleep``, a socket). Nothing else is done with that signal, and by default it does nothing, so that a
function may use SIGALRM for limits of its own, as math-verify does. In other threads and on Windows the exception is
raised at the next line of Python. Loads without torch.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

GRACE = 15.0  # seconds after the limit in which a call that is interrupted may end
_TICK = 1.0  # seconds between two looks at the calls, and between two interruptions of one
_SIGNAL: Any = getattr(signal, "SIGURG", None)

StuckHook = Callable[[str], None]


class TimeLimitExceeded(BaseException):
    """A call took longer than its limit. No Exception, so that a function's own ``except Exception`` lets it pass."""


def end_process(message: str) -> None:
    """Print a sentence to standard error and end the process with exit code 1, whatever its other threads do."""
    for stream in (sys.stdout, sys.stderr, sys.__stderr__):
        with suppress(Exception):
            stream.flush()  # type: ignore[union-attr]  # None where there is no console
    with suppress(OSError):
        os.write(2, f"error: {message}\n".encode(errors="replace"))
    os._exit(1)


@contextmanager
def stuck_calls_end_with(hook: StuckHook, own_process: bool | None = None) -> Iterator[None]:
    """Let a hook end the run inside the block when a call can be interrupted by nothing.

    Args:
        hook: is given a sentence, in another thread than the call's, which still stands in its C code; it has to end
            the process. The default is `end_process`.
        own_process: also end the process where the call holds Python's lock, so that no hook can run: faulthandler
            then prints where it stands, and the exit code is 1. A program of the user's may have an alarm of
            faulthandler of its own, which this would replace. None: as outside of the block.
    """
    global _hook, _own_process
    before = _hook, _own_process
    _hook, _own_process = hook, before[1] if own_process is None else own_process
    try:
        yield
    finally:
        _hook, _own_process = before


def limited(call: Callable[[], Any], seconds: float | None, what: str) -> Any:
    """Return what a call gives.

    Args:
        seconds: the limit; None: there is none.
        what: what is called, for the hook's sentence.

    Raises:
        TimeLimitExceeded: the limit is over. A call that was interrupted and went on all the same counts, too.
    """
    if seconds is None:
        return call()
    watched = _Watched(seconds, what)
    try:
        try:
            with _interruptible(watched), _last_resort(seconds):
                _watchdog.add(watched)
                result = call()
        finally:
            watched.end()
    except TimeLimitExceeded:
        watched.end()  # it may have been raised in the lines above
        raise
    if watched.due:
        raise TimeLimitExceeded
    return result


class _Watched:
    """A call that runs.

    Attributes:
        seconds: its limit.
        spent: seconds that it has run.
        looked: when that was counted.
        due: whether the limit is over.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self.seconds, self.what = seconds, what
        self.thread = threading.get_ident()
        self.main = _SIGNAL is not None and threading.current_thread() is threading.main_thread()
        self.spent, self.due, self.running, self.raised, self.stuck = 0.0, False, True, False, False
        self.looked = time.monotonic()
        self.handler: Any = None

    def end(self) -> None:
        """Interrupt it no more."""
        self.running = False
        if self.raised:  # and not yet seen: it would be raised later, elsewhere
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), None)
            self.raised = False

    def interrupt(self) -> None:
        """Raise `TimeLimitExceeded` in the call."""
        self.due = True
        if self.main and signal.getsignal(_SIGNAL) is self.handler:
            signal.pthread_kill(self.thread, _SIGNAL)
        else:
            self.raised = True
            raise_in(self.thread)

    def next_look(self) -> float:
        """Return the seconds until something has to be done."""
        left = self.seconds - self.spent - (time.monotonic() - self.looked)
        return _TICK if self.due else min(_TICK, max(left, 0.0) + 0.001)


def raise_in(thread: int) -> None:
    """Raise `TimeLimitExceeded` in a thread, at its next line of Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeLimitExceeded))


@contextmanager
def _interruptible(watched: _Watched) -> Iterator[None]:
    """Let the signal interrupt a call in the main thread."""
    if not watched.main:
        yield
        return

    def handler(number: int, frame: Any) -> None:
        if watched.running and watched.due:
            raise TimeLimitExceeded

    watched.handler = handler
    before = signal.signal(_SIGNAL, handler)
    try:
        yield
    finally:
        watched.running = False
        signal.signal(_SIGNAL, before if before is not None else signal.SIG_DFL)


@contextmanager
def _last_resort(seconds: float) -> Iterator[None]:
    """End the process some time after the hook should have done so, without Python's help."""
    armed = False
    if _own_process and sys.__stderr__ is not None:
        with suppress(OSError, ValueError):  # it is closed, or no file
            faulthandler.dump_traceback_later(seconds + 2 * GRACE, exit=True, file=sys.__stderr__)
            armed = True
    try:
        yield
    finally:
        if armed:
            faulthandler.cancel_dump_traceback_later()


class _Watchdog:
    """The thread that watches all calls; it begins with the first one, and sleeps while there is none."""

    def __init__(self) -> None:
        self._calls: list[_Watched] = []
        self._changed = threading.Condition()
        self._process = 0  # in which the thread runs: a forked process has none
        self._asleep = False

    def add(self, call: _Watched) -> None:
        """Watch a call until it ends."""
        if self._process != os.getpid():
            self._process, self._calls, self._changed, self._asleep = os.getpid(), [], threading.Condition(), False
            threading.Thread(target=self._watch, name="lowmem-rlhf-time-limits", daemon=True).start()
        with self._changed:
            self._calls.append(call)
            if self._asleep or call.seconds < _TICK:
                self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._calls = [call for call in self._calls if call.running]
                self._asleep = not self._calls
                self._changed.wait(min((call.next_look() for call in self._calls), default=None))
                calls = list(self._calls)
            for call in calls:
                self._look(call)

    def _look(self, call: _Watched) -> None:
        now = time.monotonic()
        # in steps, as a process that was stopped for a while (Ctrl-Z) has not run in that time
        call.spent += min(now - call.looked, 2 * _TICK)
        call.looked = now
        if call.spent < call.seconds or not call.running:
            return
        if call.spent >= call.seconds + GRACE and not call.stuck:
            call.stuck = True
            _give_up(call)
        call.interrupt()


def _give_up(call: _Watched) -> None:
    sentence = (
        f"{call.what} did not return within its time limit of {call.seconds:g} seconds and cannot be interrupted: it "
        "waits in code that is not Python; look at what it calls (a network, a lock, a subprocess) and give that a "
        "limit of its own"
    )
    if _own_process:
        faulthandler.cancel_dump_traceback_later()  # Python still runs: the hook may take its time to save
    try:
        _hook(sentence)
    except BaseException as error:
        end_process(f"{sentence}; what ends the run failed too ({type(error).__name__}: {error})")


_hook: StuckHook = end_process
_own_process = False
_watchdog = _Watchdog()
