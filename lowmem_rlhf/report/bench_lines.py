"""What a part of ``bench`` found, in a line or two for people. No torch here."""

from collections.abc import Mapping
from typing import Any

from lowmem_rlhf.display.format import format_bytes

PRECISIONS = {"nf4": "NF4", "int8": "int8", "none": "not quantized"}

Values = Mapping[str, Any]


def lines_of(name: str, part: Values) -> list[str]:
    """Return the lines of a part of a record; why it was left out or what failed is one of them."""
    lines = _LINES[name](part["values"]) if part["values"] else []
    if part.get("reason"):
        lines.append(f"{part['status']}: {part['reason']}")
    return lines


def graphs(values: Values) -> list[str]:
    """Return tokens a second by the number of rows."""
    lines = []
    for rows, found in values["rows"].items():
        speed = found["tokens_per_second"]
        beside = f"{speed['without_graphs']:,.0f} without, {speed['waves']:,.0f} by waves"
        if speed.get("graphs"):
            equal = "the same tokens" if found["equal_completions"]["graphs"] == 1 else "other tokens"
            times = found["ratio"]["without_graphs"]
            with_graphs = f"{speed['graphs']:,.0f} tokens/s with graphs"
            lines.append(f"{rows} at once: {with_graphs}, {beside} ({times:.2f} x, {equal})")
        else:
            lines.append(f"{rows} at once: tokens/s {beside}")
    return [*lines, *([f"no graphs: {values['note']}"] if values.get("note") else [])]


def step(values: Values) -> list[str]:
    """Return seconds and peaks of both sides, and their ratios."""
    sides = [
        f"{label} {values[side]['seconds']['step']:.2f} s, {format_bytes(values[side]['peak_bytes']['step'])}"
        for side, label in (("ours", "ours"), ("trl", "TRL"))
        if side in values
    ]
    if "ratio" not in values:
        return sides
    ratio = values["ratio"]
    by_phase = ", ".join(f"{phase} {share:.2f}" for phase, share in ratio["seconds"].items() if phase != "other")
    peak = f"peak, ours / TRL: {ratio['peak_bytes']['step']:.3f}"
    differ = [] if values["same_prompts"] else ["the prompts of the two sides differ"]
    return ["; ".join(sides), f"time, ours / TRL: {by_phase}", peak, *differ]


def plan(values: Values) -> list[str]:
    """Return measured over predicted, of bytes and of seconds."""
    memory = ", ".join(f"{phase} {one['ratio']:.3f}" for phase, one in values["memory"].items() if one["ratio"])
    lines = [f"memory, measured / predicted: {memory}"]
    if reserved := values.get("reserved"):
        lines.append(f"reserved by the allocator / predicted: {reserved['ratio']:.3f}")
    if time := values.get("time"):
        shares = ", ".join(f"{phase} {one['ratio']:.2f}" for phase, one in time.items() if one["ratio"])
        lines.append(f"time, measured / predicted: {shares}")
    else:
        seconds = ", ".join(f"{phase} {own:.2f} s" for phase, own in values["seconds"].items())
        lines.append(f"time, not predicted: {seconds}")
    return lines


def precisions(values: Values) -> list[str]:
    """Return seconds by phase, and the peak, of each precision."""
    lines = []
    for name, found in values.items():
        seconds = found["seconds"]
        parts = ", ".join(f"{phase} {seconds[phase]:.2f} s" for phase in ("rollout", "score", "update"))
        lines.append(f"{PRECISIONS[name]}: {parts}; peak {format_bytes(found['peak_bytes']['step'])}")
    return lines


def device_tests(values: Values) -> list[str]:
    """Return how many tests ended in which way, and the names of those that failed."""
    cut = "" if values["finished"] else ", the rest had no time"
    counts = f"{values['passed']} passed, {values['failed']} failed, {values['skipped']} skipped{cut}"
    return [counts, *(f"failed: {name}" for name in values["failures"])]


_LINES = {
    "graphs": graphs,
    "step": step,
    "plan": plan,
    "precisions": precisions,
    "device_tests": device_tests,
}
