"""What a run shows while it works: a progress display in a terminal, one line a step elsewhere; and its tables."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lowmem_rlhf.display.format import (
    evaluated_on,
    evaluation_table,
    format_bytes,
    format_measure,
    format_number,
    format_seconds,
    format_value,
    in_words,
    number,
)
from lowmem_rlhf.plain_text import harmless

WIDTH = 120  # columns of a table that goes to a file or another program
_RECENT = 10  # steps that the ETA and the reward's trend look back on


class LiveView:
    """The training loop's display, entered with ``with``.

    In a terminal: a bar over the steps with the time left, the latest metrics, and a bar for the current phase.
    Elsewhere (a pipe, CI): one flushed line a step. Missing and null metrics are left out.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        step_seconds: float | None = None,
    ) -> None:
        """Prepare the display of steps ``start_step + 1`` to ``total_steps``.

        Args:
            step_seconds: what a step is predicted to take, for the time left until one was measured.
        """
        self.total_steps = total_steps
        self.console = console or Console()
        self._step = start_step
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._rewards: deque[float] = deque(maxlen=2 * _RECENT)
        self._evaluated = ""  # what the last evaluation found
        self._last = time.monotonic()
        self._live: Live | None = None
        name, eta = TextColumn("{task.description}"), TextColumn("{task.fields[eta]}")
        self._bars = Progress(name, BarColumn(), MofNCompleteColumn(), eta, console=self.console)
        left = step_seconds and format_seconds(step_seconds * max(total_steps - start_step, 0))
        eta_now = f"ETA {left}, predicted" if left else ""
        self._steps = self._bars.add_task("step", total=total_steps, completed=start_step, eta=eta_now)
        self._phase = self._bars.add_task("", total=None, visible=False, eta="")
        self._status = Text("waiting for the first step", style="dim")

    def __enter__(self) -> "LiveView":
        self._last = time.monotonic()
        if self.console.is_interactive:
            self._live = Live(self._content(), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._bars.update(self._phase, visible=False)
            self._live.update(self._content())
            self._live.stop()
            self._live = None

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show the part of the step that runs now, with ``done`` of ``total`` (None: unknown) units of its work."""
        if self._live is not None:
            self._bars.update(self._phase, description=name, completed=done, total=total, visible=True)

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a finished step's metrics (the rows of metrics.jsonl)."""
        now = time.monotonic()
        self._seconds.append(number(metrics.get("time/step")) or now - self._last)
        self._last = now
        step = number(metrics.get("step"))
        self._step = self._step + 1 if step is None else int(step)
        if (reward := number(metrics.get("reward/mean"))) is not None:
            self._rewards.append(reward)
        eta = format_seconds(sum(self._seconds) / len(self._seconds) * max(self.total_steps - self._step, 0))
        parts = _metric_parts(metrics, self._trend() if self._live is not None else "")
        if self._live is None:
            self._print("  ".join([f"step {self._step}/{self.total_steps}", *parts, f"ETA {eta}"]))
            return
        self._bars.update(self._steps, completed=self._step, eta=f"ETA {eta}")
        self._bars.update(self._phase, visible=False)
        if (name := metrics.get("eval/headline")) is not None:
            value = format_measure(str(name), metrics.get(f"eval/{name}"))
            self._evaluated = f"held-out {in_words(str(name))} {value} after step {self._step}"
        self._status = Text("\n".join(filter(None, ("   ".join(parts), self._evaluated))))
        self._live.update(self._content())

    def message(self, text: str) -> None:
        """Print a line (or several) that stays, above the display."""
        if self._live is not None:
            self._live.console.print(Text(harmless(text)))
        else:
            self._print(text)

    def _content(self) -> Group:
        return Group(self._status, self._bars)

    def _print(self, text: str) -> None:
        # Written as it is: rich would fold the line at 80 columns. Old Windows code pages lack some characters.
        encoding = self.console.encoding
        self.console.file.write(harmless(text).encode(encoding, "replace").decode(encoding, "replace") + "\n")
        self.console.file.flush()

    def _trend(self) -> str:
        """Return the change of the mean reward between the earlier and the later half of the recent steps."""
        rewards, half = list(self._rewards), len(self._rewards) // 2
        if half < 2:
            return ""
        change = sum(rewards[-half:]) / half - sum(rewards[:half]) / half
        return f" ({change:+.2g} in {half} steps)"


def tokens_per_second(metrics: dict[str, Any]) -> float | None:
    """Return the tokens generated plus the tokens trained on, over the seconds of the whole step.

    None when the time or both counts are missing. Generated tokens are the completions'; trained tokens are what
    the loop logs as ``tokens/trained``.
    """
    seconds = number(metrics.get("time/step"))
    counts = [n for key in ("tokens/generated", "tokens/trained") if (n := number(metrics.get(key))) is not None]
    return sum(counts) / seconds if seconds and counts else None


def _metric_parts(metrics: dict[str, Any], trend: str) -> list[str]:
    texts = {
        "reward/mean": "reward {:.3f}" + trend,
        "kl": "kl {:.2g}",
        "completion/mean_length": "len {:.1f}",
    }
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


def print_plan(plan_dict: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan: the device, every setting with its reason, and the memory by phase against the budget."""
    console = console or Console()
    device, memory = plan_dict.get("device") or {}, plan_dict.get("memory") or {}
    facts = [str(device.get("name", "unknown device")), f"{format_bytes(device.get('total_bytes'))} total"]
    facts.append(f"{format_bytes(device.get('free_bytes'))} free")
    if plan_dict.get("profile"):
        facts.append(f"profile {plan_dict['profile']}")
    console.print(Text(harmless(", ".join(facts)), style="bold"))
    for note in device.get("notes") or ():
        console.print(Text(harmless(str(note)), style="dim"))
    reasons = plan_dict.get("reasons") or {}
    settings = (plan_dict.get("settings") or {}).items()
    console.print()
    console.print(
        plain_table(("setting", "value", "why"), ((k, format_value(v), reasons.get(k, "")) for k, v in settings))
    )
    if placements := plan_dict.get("rewards"):
        console.print()
        where = ((name, one.get("model"), one.get("device"), one.get("reason")) for name, one in placements.items())
        console.print(plain_table(("learned reward", "model", "device", "why"), where))
    phases = memory.get("phases") or {}
    rows = ((name, format_bytes(sum(parts.values())), _biggest(parts)) for name, parts in phases.items())
    if phases:
        console.print()
        console.print(plain_table(("memory", "bytes", "most of it"), rows))
    verdict, style = ("fits", "bold green") if plan_dict.get("fits") else ("does not fit", "bold red")
    unknown = plan_dict.get("verdict") == "unknown"
    if unknown:
        verdict, style = f"unknown; by the estimate it {verdict}", "bold yellow"
    peak, budget = format_bytes(memory.get("peak_bytes")), format_bytes(memory.get("budget_bytes"))
    console.print()
    console.print(Text(f"peak {peak} of {budget}: {verdict}", style=style))
    for line in _ranges(plan_dict, unknown):
        console.print(Text(line, style="dim"))
    print_time(plan_dict, console)


def print_time(plan_dict: dict[str, Any], console: Console) -> None:
    """Print how long a step and the run are predicted to take, where the run fits."""
    if "time" not in plan_dict or not plan_dict.get("fits"):
        return
    console.print()
    if (time_dict := plan_dict["time"]) is None:
        device = plan_dict.get("device") or {}
        unknown = f"nobody tells how fast {device.get('name', 'the device')} is"
        why = "the terms of its passes are not known" if device.get("speed") or device.get("cores") else unknown
        console.print(Text(harmless(f"how long it takes is not predicted: {why}"), style="dim"))
        return
    low, high = time_dict["step_seconds_range"]
    rows = [(name, _short(seconds), "") for name, seconds in time_dict["phases"].items()]
    rows.append(("a step", _short(time_dict["step_seconds"]), _between(low, high)))
    if time_dict["evaluation_seconds"]:
        times = time_dict.get("evaluations")
        often = f" (of {times} times)" if times is not None and times != 2 else ""
        rows.append((f"held-out examples, once{often}", format_seconds(time_dict["evaluation_seconds"]), ""))
    if time_dict["run_seconds"] is not None:
        low, high = time_dict["run_seconds_range"]
        rows.append(
            (f"the run of {time_dict['steps']} steps", format_seconds(time_dict["run_seconds"]), _between(low, high))
        )
    console.print(plain_table(("time", "predicted", "at full length"), rows))


def _between(low: float, high: float) -> str:
    return f"between {_short(low)} and {_short(high)}"


def _short(seconds: float) -> str:
    return format_seconds(seconds) if seconds >= 10 else f"{seconds:.2g}s"


def print_evaluation(evaluation: dict[str, Any], console: Console | None = None) -> None:
    """Print the held-out results before and after training, with their intervals and ratio."""
    console = console or Console()
    head, rows = evaluation_table(evaluation)
    if not rows:
        console.print(Text("no held-out evaluation", style="dim"))
        return
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(plain_table(head, rows))
    if said := evaluated_on(evaluation):
        console.print(Text(said, style="dim"))


def _ranges(plan_dict: dict[str, Any], unknown: bool) -> Iterator[str]:
    """Yield between which numbers the peak lies, and on a CPU what the process will show."""
    memory = plan_dict.get("memory") or {}
    low, high = plan_dict.get("peak_bytes_range") or (None, None)
    if unknown:
        rest = "four times the estimate of the rest"
        whose = "the process: " if "process" in memory else ""
        yield f"{whose}between {format_bytes(low)} (what is counted) and {format_bytes(high)} ({rest})"
    elif (low := memory.get("low_bytes")) != (high := memory.get("high_bytes")):
        yield f"between {format_bytes(low)} (live tensors) and {format_bytes(high)} (a wasteful allocator)"
    if process := memory.get("process"):
        parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in process.items())
        yield f"the process will show up to {format_bytes(sum(process.values()))}: {parts}"
    if host := memory.get("host"):
        experts = f", and {format_bytes(host['experts'])} of experts" if "experts" in host else ""
        yield f"in host memory: {format_bytes(host['trained_state'])}, the state of the last finished step{experts}"


def _biggest(parts: dict[str, float]) -> str:
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in largest if size)


def plain_table(columns: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> Table:
    """Return a table of plain text: brackets in a value are no markup, and control characters are written out."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(Text(harmless(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(harmless(str(cell))) for cell in row))
    return table
