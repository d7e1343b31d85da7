"""The plainest display: messages as lines of a stream."""

from typing import TextIO


class Lines:
    """Shows messages as lines, and no phases."""

    def __init__(self, stream: TextIO) -> None:
        """Show on a stream."""
        self.stream = stream

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show a line."""
        print(text, file=self.stream, flush=True)
