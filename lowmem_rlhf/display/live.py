"""What a run shows while it works: a panel of fixed height in a terminal, lines elsewhere."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lowmem_rlhf.display.format import format_bytes, format_number, format_seconds, number
from lowmem_rlhf.display.panel import Panel, joined
from lowmem_rlhf.display.state import EVALUATION, RunState
from lowmem_rlhf.plain_text import harmless

FRAMES_A_SECOND = 2  # drawing one takes 2 to 3 ms from the thread that starts kernels
_SILENT = 60  # seconds after which a pipe is told how far a phase is


class LiveView:
    """The training loop's display, entered with ``with``.

    In a terminal: a line for every finished step, and below them the panel of the run (`panel`). Elsewhere (a pipe,
    CI): one flushed line a step, at the beginning of an evaluation, and once a minute in whatever takes longer. Missing
    and null metrics are left out.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        plan: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display of steps ``start_step + 1`` to ``total_steps``.

        Args:
            plan: as `RunState` takes it.
        """
        self.console = console or Console()
        self.state = RunState(total_steps, start_step, plan, clock)
        self.panel = Panel(self.state)
        self._clock, self._told = clock, clock()
        self._live: Live | None = None

    def __enter__(self) -> "LiveView":
        if self.console.is_interactive:
            self._live = Live(self.panel, console=self.console, refresh_per_second=FRAMES_A_SECOND)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            ended = self.state.step >= self.state.total and not any(error)
            self.panel.ended = "finished" if ended else f"ended after step {self.state.step}"
            self._live.stop()
            self._live = None

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the part of the step that runs now, with ``done`` of ``total`` (None: unknown) units of its work."""
        begins = self.state.phase(name, done, total)
        if self._live is not None:
            return
        if (begins and name.startswith(EVALUATION)) or self._clock() - self._told > _SILENT:
            far = f" {done}/{total}" if total else ""
            self._print(f"{name}{far}")

    def samples(self, best: dict[str, Any], worst: dict[str, Any]) -> None:
        """Show the completions of the highest and the lowest reward of a rollout."""
        self.state.show_samples(best, worst)

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a finished step's metrics (the rows of metrics.jsonl)."""
        state = self.state
        state.finish(metrics)
        parts = [f"step {state.step}/{state.total}", *_metric_parts(metrics)]
        if self._live is None:
            self._print("  ".join([*parts, f"ETA {format_seconds(state.time_left())}"]))
        else:
            line = joined(parts, self.console.width - 1, "  ")
            self._live.console.print(Text(line, no_wrap=True, overflow="ellipsis"))

    def message(self, text: str) -> None:
        """Print a line (or several) that stays, above the display."""
        if self._live is not None:
            self._live.console.print(Text(harmless(text)))
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        # Written as it is: rich would fold the line at 80 columns. Old Windows code pages lack some characters.
        encoding = self.console.encoding
        self.console.file.write(harmless(text).encode(encoding, "replace").decode(encoding, "replace") + "\n")
        self.console.file.flush()
        self._told = self._clock()


def tokens_per_second(metrics: dict[str, Any]) -> float | None:
    """Return the tokens generated plus the tokens trained on, over the seconds of the whole step.

    None when the time or both counts are missing. Generated tokens are the completions'; trained tokens are what
    the loop logs as ``tokens/trained``.
    """
    seconds = number(metrics.get("time/step"))
    counts = [n for key in ("tokens/generated", "tokens/trained") if (n := number(metrics.get(key))) is not None]
    return sum(counts) / seconds if seconds and counts else None


def _metric_parts(metrics: dict[str, Any]) -> list[str]:
    texts = {"reward/mean": "reward {:.3f}", "kl": "kl {:.2g}", "completion/mean_length": "len {:.1f}"}
    if "reward/mean" not in metrics:  # what learns from given texts
        texts = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "eval/loss": "held-out loss {:.4f}"}
    found = {key: value for key in texts if (value := number(metrics.get(key))) is not None}
    parts = [texts[key].format(value) for key, value in found.items()]
    if (seconds := number(metrics.get("time/step"))) is not None:
        parts.append(f"{format_number(seconds)} s/step")
    if (speed := tokens_per_second(metrics)) is not None:
        parts.append(f"{speed:,.0f} tok/s")
    if (peak := number(metrics.get("memory/peak_bytes"))) is not None:
        parts.append(f"peak {format_bytes(peak)}")
    return parts
