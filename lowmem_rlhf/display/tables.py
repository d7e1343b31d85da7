"""Tables in a terminal: a plan, its time, held-out results. No torch here."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowmem_rlhf.display.format import (
    evaluated_on,
    evaluation_table,
    format_bytes,
    format_seconds,
    format_value,
)
from lowmem_rlhf.plain_text import harmless

WIDTH = 120  # columns of a table that goes to a file or another program
_GAP = 2  # columns between two of a table
_SHORT_VALUE = 12  # columns of a value beside its reason
_REASON = 36  # the fewest columns of reasons that stand beside their settings


def print_plan(plan_dict: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan: the device, every setting with its reason, and the memory by phase against the budget."""
    console = fitted(console or Console())
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
    console.print(_settings_table([(k, format_value(v), str(reasons.get(k, ""))) for k, v in settings], console.width))
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


def _settings_table(rows: list[tuple[str, str, str]], width: int) -> Table:
    """Return the settings with their reasons, which get the width that there is.

    A value that is long itself stands before its reason. Where too little is left for the reasons they stand below.
    """
    values = [value for _, value, _ in rows if len(value) <= _SHORT_VALUE]
    used = max((len(key) for key, *_ in rows), default=0) + max(map(len, values), default=0) + 2 * _GAP
    if width - used < _REASON:
        table = plain_table((), ())
        table.add_column()
        table.show_header = False
        for key, value, why in rows:
            table.add_row(Text.assemble((harmless(key), "bold"), " ", harmless(value)))
            if why:
                table.add_row(Padding(Text(harmless(why)), (0, 0, 0, 2)))
        return table
    cells = ((k, v, why) if len(v) <= _SHORT_VALUE else (k, "", f"{v}: {why}" if why else v) for k, v, why in rows)
    return plain_table(("setting", "value", "why"), cells)


def fitted(console: Console) -> Console:
    """Return the console, as wide as tables of files and other programs are if it is not a terminal."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    return console


def print_listing(rows: Iterable[tuple[str, str]], console: Console | None = None) -> None:
    """Print names and what they are: a line each, which a terminal folds within its second column."""
    console, rows = console or Console(highlight=False), list(rows)
    longest = max((len(name) for name, _ in rows), default=0)
    if not console.is_terminal or console.width < longest + _REASON:
        for name, text in rows:
            console.file.write(harmless(f"{name:{longest}}  {text}") + "\n")
        return
    table = Table.grid(padding=(0, _GAP, 0, 0))
    for name, text in rows:
        table.add_row(Text(harmless(name), no_wrap=True), Text(harmless(text)))
    console.print(table)


def print_time(plan_dict: dict[str, Any], console: Console) -> None:
    """Print how long a step and the run are predicted to take, where the run fits."""
    if "time" not in plan_dict or not plan_dict.get("fits"):
        return
    console.print()
    if (time_dict := plan_dict["time"]) is None:
        device = plan_dict.get("device") or {}
        unknown = f"nobody tells how fast {device.get('name', 'the device')} is"
        why = (
            "the time of its passes, or of the server that samples, is not known"
            if device.get("speed") or device.get("cores")
            else unknown
        )
        console.print(Text(harmless(f"how long it takes is not predicted: {why}"), style="dim"))
        return
    low, high = time_dict["step_seconds_range"]
    rows = [(name, short_seconds(seconds), "") for name, seconds in time_dict["phases"].items()]
    rows.append(("a step", short_seconds(time_dict["step_seconds"]), _between(low, high)))
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
    return f"between {short_seconds(low)} and {short_seconds(high)}"


def short_seconds(seconds: float) -> str:
    """Return seconds with two digits below ten of them."""
    return format_seconds(seconds) if seconds >= 10 else f"{seconds:.2g}s"


def print_evaluation(evaluation: dict[str, Any], console: Console | None = None) -> None:
    """Print the held-out results before and after training, with their intervals and ratio."""
    console = fitted(console or Console())
    head, rows = evaluation_table(evaluation)
    if not rows:
        console.print(Text("no held-out evaluation", style="dim"))
        return
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
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
    for column in columns:
        table.add_column(Text(harmless(column)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(harmless(str(cell))) for cell in row))
    return table
