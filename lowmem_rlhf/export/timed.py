"""Progress of work that writes bytes: a phase of the display, and at the end a line with the size and the time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lowmem_rlhf.display.format import format_bytes, format_seconds
from lowmem_rlhf.progress import ProgressCallback, current, message


@contextmanager
def timed(name: str) -> Iterator[ProgressCallback]:
    """Show work as a phase of the current display while the block runs.

    Yields:
        A function that is told (bytes done, bytes in all).
    """
    start, size = time.monotonic(), 0

    def move(done: int, total: int) -> None:
        nonlocal size
        size = done
        current().phase(name, done, total)

    yield move
    message(f"{name}: {format_bytes(size)} in {format_seconds(time.monotonic() - start)}")
