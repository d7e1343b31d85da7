"""A terminal that may be closed while a run goes on: what is written to it afterwards is lost, and nothing else."""

import errno
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class LastingTerminal(io.TextIOWrapper):
    """A standard stream on a terminal, where writing never fails because the terminal is gone."""

    def write(self, text: str, /) -> int:
        """Write, if there still is a terminal."""
        with _closed_ignored():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if there still is a terminal."""
        with _closed_ignored():
            super().flush()


@contextmanager
def _closed_ignored() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def prepare_streams() -> None:
    """Let the standard streams replace characters that the console lacks, and outlast their terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="replace")
        if stream.isatty():
            lasting = LastingTerminal(
                stream.buffer,
                encoding=stream.encoding,
                errors="replace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,  # with PYTHONUNBUFFERED, as containers set it
            )
            stream.detach()
            setattr(sys, name, lasting)
