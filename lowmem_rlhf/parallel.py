"""Work that waits, on programs or a network: done by a few threads at once, and ended all together."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_TICK = 0.5  # seconds
_PATIENCE = 5.0  # seconds in which work that was told to end may do so; then it is left behind


class Ending:
    """How work that runs is told to end before it is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: list[Callable[[], object]] = []
        self.begun = threading.Event()

    @contextmanager
    def by(self, end: Callable[[], object]) -> Iterator[None]:
        """Let this be called, in another thread, where work inside the block has to end; at once where it has begun."""
        with self._lock:
            self._ends.append(end)
            late = self.begun.is_set()
        if late:
            self._call(end)
        try:
            yield
        finally:
            with self._lock:
                self._ends.remove(end)

    def now(self) -> None:
        """End all work."""
        with self._lock:  # held meanwhile, so that none of them is called after its block
            self.begun.set()
            for end in self._ends:
                self._call(end)

    @staticmethod
    def _call(end: Callable[[], object]) -> None:
        with suppress(OSError):  # what it closes is closed already
            end()


def in_parallel(work: Callable[[T, Ending], R], items: Sequence[T], workers: int) -> list[R]:
    """Return what work gives for each item, in order; at most so many are at work at once.

    Where one raises, or this thread is interrupted (Ctrl-C, a time limit), all work is ended, and that is raised.
    """
    ending, lock, places = Ending(), threading.Lock(), iter(range(len(items)))
    results: dict[int, Any] = {}
    errors: list[BaseException] = []
    # not Thread.join: in Python 3.11 a signal during it marks a thread that runs as one that has ended
    ended: SimpleQueue[None] = SimpleQueue()

    def run() -> None:
        try:
            while not ending.begun.is_set():
                with lock:
                    place = next(places, None)
                if place is None:
                    return
                results[place] = work(items[place], ending)
        except BaseException as error:
            errors.append(error)
            ending.now()
        finally:
            ended.put(None)

    running = 0
    try:
        for _ in range(min(workers, len(items))):
            threading.Thread(target=run, daemon=True).start()
            running += 1
        while running:
            with suppress(Empty):  # in other threads than the main one a time limit is raised between two lines alone
                ended.get(timeout=_TICK)
                running -= 1
    except BaseException:
        ending.now()
        with suppress(Empty):
            until = time.monotonic() + _PATIENCE
            for _ in range(running):
                ended.get(timeout=max(0.0, until - time.monotonic()))
        raise
    if errors:
        raise errors[0]
    return [results[place] for place in range(len(items))]
