"""A bar over bytes, with the time left; elsewhere than in a terminal a line when it is done."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lowmem_rlhf.display.format import format_bytes, format_seconds


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (bytes done, bytes in all) that moves the bar."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    start, seen = time.monotonic(), [0]
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        task = shown.add_task(what, total=None, visible=console.is_interactive)

        def move(done: int, total: int) -> None:
            seen[0] = done
            shown.update(task, completed=done, total=total)

        yield move
    took = format_seconds(time.monotonic() - start)
    print(f"{what}: {format_bytes(seen[0])} in {took}", file=sys.stderr, flush=True)
