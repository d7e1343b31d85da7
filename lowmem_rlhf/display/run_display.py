"""What a run shows (plan, steps, results): on a console, in a notebook, on a program's own display, or nowhere."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console

from lowmem_rlhf.display.lines import Bars
from lowmem_rlhf.display.live import LiveView
from lowmem_rlhf.display.tables import print_evaluation, print_plan
from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.plain_text import harmless
from lowmem_rlhf.processes.start import rank_of_process
from lowmem_rlhf.progress import Progress, Silence


class RunDisplay(Progress, Protocol):
    """A display that knows the parts of a run; one that has `samples` is shown them (`progress.show_samples`)."""

    def plan(self, plan: dict[str, Any]) -> None:
        """Show a plan (as ``plan --json`` gives it)."""
        ...

    def begin(self, total_steps: int, step: int) -> None:
        """Show that steps begin, after so many."""
        ...

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a finished step's row of metrics.jsonl."""
        ...

    def end(self) -> None:
        """Show that no more steps come."""
        ...

    def evaluation(self, evaluation: dict[str, Any]) -> None:
        """Show the content of evaluation.json."""
        ...


class ConsoleDisplay:
    """Bars and tables in a terminal, plain lines in a pipe."""

    def __init__(self, console: Console | None = None, notes: Console | None = None) -> None:
        """Show on a console; bars before the steps go to ``notes``, standard error by default."""
        self.console, self._bars = console or Console(), Bars(notes)
        self._view: LiveView | None = None
        self._plan: dict[str, Any] | None = None

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show a bar, in a terminal."""
        if self._view is not None:
            self._view.phase(name, done, total)
        else:
            self._bars.phase(name, done, total)

    def message(self, text: str) -> None:
        """Show a line that stays."""
        if self._view is not None:
            self._view.message(text)
            return
        self._bars.stop()
        encoding = self.console.encoding
        self.console.file.write(harmless(text).encode(encoding, "replace").decode(encoding, "replace") + "\n")
        self.console.file.flush()

    def plan(self, plan: dict[str, Any]) -> None:
        """Show the table of settings, memory and time."""
        self._bars.stop()
        self._plan = plan
        print_plan(plan, self.console)

    def begin(self, total_steps: int, step: int) -> None:
        """Open the live view."""
        self._bars.stop()
        self._view = LiveView(total_steps, step, self.console, self._plan)
        self._view.__enter__()

    def samples(self, best: dict[str, Any], worst: dict[str, Any]) -> None:
        """Show two completions of a rollout."""
        if self._view is not None:
            self._view.samples(best, worst)

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a finished step."""
        if self._view is not None:
            self._view.step(metrics)

    def end(self) -> None:
        """Close the live view."""
        if self._view is not None:
            self._view.__exit__(None, None, None)
            self._view = None
        self._bars.stop()

    def evaluation(self, evaluation: dict[str, Any]) -> None:
        """Show the table of held-out results."""
        print_evaluation(evaluation, self.console)


class ForwardingDisplay:
    """A run's parts as phases and messages of any `Progress`."""

    def __init__(self, progress: Progress) -> None:
        """Forward to a program's own display, or to one that shows nothing."""
        self._progress = progress
        self._total = 0

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Forward it."""
        self._progress.phase(name, done, total)

    def message(self, text: str) -> None:
        """Forward it."""
        self._progress.message(text)

    def plan(self, plan: dict[str, Any]) -> None:
        """Leave it out: who wants the plan has it as a value."""

    def begin(self, total_steps: int, step: int) -> None:
        """Forward it as a phase."""
        self._total = total_steps
        self._progress.phase("steps", step, total_steps)

    def step(self, metrics: dict[str, Any]) -> None:
        """Forward it as a phase."""
        self._progress.phase("steps", int(metrics["step"]), self._total)

    def end(self) -> None:
        """Leave it out."""

    def evaluation(self, evaluation: dict[str, Any]) -> None:
        """Leave it out: it is in the run."""


class _OwnDisplay:
    """A program's own display; one that fails is told nothing more, which is a warning, and the run goes on."""

    def __init__(self, display: Any) -> None:
        self._display, self._failed = display, False

    def __getattr__(self, name: str) -> Callable[..., None] | None:
        method = getattr(self._display, name)
        if not callable(method):  # a program's own attribute
            return None

        def call(*args: Any, **named: Any) -> None:
            if self._failed:
                return
            try:
                method(*args, **named)
            except Exception as error:
                self._failed = True
                warnings.warn(
                    f"progress: the display failed in {name} and is told nothing more: {one_line(error)}", stacklevel=2
                )

        return call


def display_for(progress: Any) -> RunDisplay:
    """Return the display that a caller asks for; of several processes the first one shows the run.

    Args:
        progress: ``"auto"`` (a notebook's in Jupyter, else the console's), None or False for silence, or an object with
            the methods ``phase`` and ``message`` (see `Progress`).

    Raises:
        UserError: it is something else.
    """
    if rank_of_process():
        return ForwardingDisplay(Silence())
    if progress == "auto" or progress is True:
        if _in_notebook():
            from lowmem_rlhf.display.notebook import NotebookDisplay

            return NotebookDisplay()
        return ConsoleDisplay()
    if progress is None or progress is False:
        return ForwardingDisplay(Silence())
    if all(callable(getattr(progress, name, None)) for name in ("plan", "begin", "step", "end", "evaluation")):
        whole: Any = _OwnDisplay(progress)
        return whole  # type: ignore[no-any-return]  # it has the methods of what it wraps
    if all(callable(getattr(progress, name, None)) for name in ("phase", "message")):
        forwarded: Any = _OwnDisplay(progress)
        return ForwardingDisplay(forwarded)
    raise UserError(
        f'progress: got {progress!r}; give "auto", None for silence, or an object with the methods phase and message'
    )


@contextmanager
def steps_shown(display: RunDisplay, total_steps: int, step: int) -> Iterator[None]:
    """Begin the display of steps, and end it however the block ends."""
    display.begin(total_steps, step)
    try:
        yield
    finally:
        display.end()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
