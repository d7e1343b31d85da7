"""What the rows of a recipe become, as text: examples, lengths, what is left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from lowmem_rlhf.display.format import format_number
from lowmem_rlhf.display.tables import plain_table
from lowmem_rlhf.plain_text import harmless

_STEP = {
    "examples": "examples a step",
    "steps_per_epoch": "steps of an epoch",
    "prompt_tokens": "prompt tokens a step",
    "completions": "completions a step",
    "generated_at_most": "generated tokens at most",
    "tokens": "tokens a step",
    "learned_tokens": "learned tokens a step",
}
_BAR = 40  # characters of the longest bar of a histogram
_LEARNED = ("learned", "chosen", "rejected", "good answer", "bad answer", "class")


def print_preview(preview: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `session.check.RecipeCheck` gives as a dictionary.

    Special tokens are written out and line breaks shown as such; what is learned is named and coloured.
    """
    console = console or Console()
    console.print(_plain(f"{preview['recipe']}: {preview['algorithm']}, {preview['model']}", style="bold"))
    for line in preview["said"]:
        console.print(_plain(line, style="dim"))
    for task, splits in preview.get("tasks", {"": preview}).items():
        for name in ("train", "eval"):
            if (split := splits.get(name)) is not None:
                _print_split(f"{task} {name}".lstrip(), split, console)
    console.print()
    for key, label in _STEP.items():
        if key in preview["step"]:
            console.print(f"{label + ':':28} {format_number(preview['step'][key])}")


def _print_split(name: str, split: Mapping[str, Any], console: Console) -> None:
    console.print()
    head = f"{name}: {split['source']}, {_counted(split['rows'], 'row')}, {_counted(split['examples'], 'example')}"
    console.print(_plain(head, style="bold"))
    for number, example in enumerate(split["shown"], start=1):
        _print_example(number, example, console)
    _print_lengths(split["lengths"], console)
    _print_left_out(split["left_out"], console)
    for line in split["said"]:
        console.print(_plain(f"note: {line}"))


def _print_example(number: int, example: Sequence[Mapping[str, Any]], console: Console) -> None:
    console.print(_plain(f"\nexample {number}", style="dim"))
    for part in example:
        learned = part["part"] in _LEARNED
        tokens = f" ({part['tokens']} tokens)" if part["tokens"] else ""
        console.print(_plain(f"  {part['part']}{tokens}", style="green" if learned else "cyan"))
        for line in part["text"].split("\n"):
            console.print(_plain(f"    | {line}", style="green" if learned else ""))


def _print_lengths(lengths: Mapping[str, Any], console: Console) -> None:
    bins = lengths["histogram"]
    if not bins:
        return
    console.print(
        f"\ntokens an example: {lengths['min']} to {lengths['max']}, median {lengths['median']}, 95 % have at most "
        f"{lengths['p95']}"
    )
    most, width = max(one["count"] for one in bins), len(f"{bins[-1]['to']:,}")
    for one in bins:
        bar = "█" * max(round(_BAR * one["count"] / most), 1 if one["count"] else 0)
        console.print(_plain(f"  {one['from']:>{width},} - {one['to']:>{width},}  {bar} {one['count']:,}"))


def _print_left_out(reasons: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not reasons:
        return
    console.print()
    rows = ((one["reason"], f"{one['count']:,}", one["row"], one["example"]) for one in reasons)
    console.print(plain_table(("left out", "rows", "first", "why"), rows))


def _plain(text: str, style: str = "") -> Text:
    return Text(harmless(text), style=style)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
