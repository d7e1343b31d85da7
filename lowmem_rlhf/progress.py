"""What long work tells of itself while it runs: its phase and how far it is, and lines that stay.

A display implements `Progress` (`display.live` for terminals and pipes). The library itself shows nothing: who wants to
see something enters `shown_by`, as the command line does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

ProgressCallback = Callable[[int, int], None]  # is told (units done, units in all)


class Progress(Protocol):
    """Where long work reports."""

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the part of the work that runs now, with ``done`` of ``total`` (None: unknown) units."""
        ...

    def message(self, text: str) -> None:
        """Show a line (or several) that stays."""
        ...


def show_samples(progress: Progress, best: dict[str, Any], worst: dict[str, Any]) -> None:
    """Show completions of a rollout, with ``prompt``, ``completion`` and ``reward``, on a display that takes them."""
    show = getattr(progress, "samples", None)
    if callable(show):
        show(best, worst)


class Silence:
    """A display that shows nothing."""

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""


_SILENCE = Silence()
_current: ContextVar[Progress] = ContextVar("progress", default=_SILENCE)


def current() -> Progress:
    """Return the display that this thread's work reports to; one that shows nothing where none was entered."""
    return _current.get()


def message(text: str) -> None:
    """Show a line (or several) on the current display."""
    current().message(text)


def reported_as(name: str) -> ProgressCallback:
    """Return a callback that shows a phase on the current display."""
    return lambda done, total: current().phase(name, done, total)


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Let everything inside the block report to this display."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)
