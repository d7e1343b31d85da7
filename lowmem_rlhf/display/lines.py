"""Messages as plain lines, with a bar for the current phase: for commands whose result is on the standard output."""

import sys
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lowmem_rlhf.plain_text import harmless


class Lines:
    """A display that prints messages and shows no phases."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Print on a stream; None: on what is standard error at that time."""
        self.stream = stream

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Print a line (or several)."""
        print(harmless(text), file=self.stream or sys.stderr, flush=True)


class Bars(Lines):
    """`Lines` with a bar and the time left for the current phase; nothing where nobody watches.

    It is entered with ``with``. The bar stops when its phase is complete, when another one begins, or at the end.
    """

    transient = False  # whether a bar goes when it stops

    def __init__(self, console: Console | None = None) -> None:
        """Show the bar on a console, standard error's by default."""
        super().__init__()
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._name = ""

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Move the bar of a phase to ``done`` of ``total`` (None: unknown) units."""
        if not self.console.is_interactive:
            return
        if self._bar is None or name != self._name:
            self.stop()
            columns = (TextColumn("{task.description}"), BarColumn(), *self.columns(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=self.transient)
            self._bar.add_task(name, total=total)
            self._bar.start()
            self._name = name
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        if done == total:
            self.stop()

    def stop(self) -> None:
        """Stop the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def columns(self) -> tuple[ProgressColumn, ...]:
        """Return what tells how far a phase is."""
        return (MofNCompleteColumn(),)


class ByteBars(Bars):
    """`Bars` of phases whose units are bytes, which go when they are complete."""

    transient = True

    def columns(self) -> tuple[ProgressColumn, ...]:
        """Return the size and the speed."""
        return (DownloadColumn(True), TransferSpeedColumn())
