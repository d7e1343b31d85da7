"""A record of ``bench`` as a table on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_rlhf.plain_text import harmless
from lowmem_rlhf.report.bench_lines import lines_of

_WIDE = 160  # columns outside a terminal


def print_record(record: dict[str, Any], console: Console | None = None) -> None:
    """Print the card, the versions and what each part found."""
    console = console or Console()
    if not console.is_terminal:
        console.width = _WIDE
    console.print(Text(heading(record), style="bold"))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, part in record["parts"].items():
        lines = lines_of(name, part)
        for number, line in enumerate(lines):
            table.add_row(part["title"] if number == 0 else "", Text(harmless(line)))
    console.print(table)


def heading(record: dict[str, Any]) -> str:
    """Return what a record was measured with, in a line."""
    device, versions, model = record["device"], record["versions"], record["model"]
    facts = [
        device["name"],
        f"driver {device['driver']}" if device.get("driver") else "",
        f"torch {versions['torch']}",
        f"{model['name']}, {model['weights'] or 'no'} weights, {model['compute_dtype']}",
        f"commit {record['commit']}" if record["commit"] else f"version {record['package']}",
    ]
    return harmless(", ".join(fact for fact in facts if fact))
