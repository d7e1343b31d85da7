"""Logs that grow by whole lines, read as they grow: each byte once, a block at a time."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lowmem_rlhf.errors import UserError

BLOCK = 1 << 20  # bytes read at once
LONGEST = 16 << 20  # bytes of a line; a longer one is no row of ours, and is skipped
_GUARD = 256  # bytes before the end of what was read, which tell whether the log is still the same


class Missing(UserError):
    """What is asked for is not there: a run, or a row of it."""


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read it; a pipe or a device of that name is not waited for.

    Raises:
        OSError: it cannot be opened, or is no file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        yield file


class GrowingLog:
    """The whole lines of a log. What follows the last newline is half-written and not seen before it is whole.

    Attributes:
        path: the file, which need not be there yet.
        end: bytes that were read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        self._file: tuple[int, int] | None = None
        self._guard = b""

    def begins_anew(self) -> bool:
        """Whether what was read is no longer what the file holds: it was taken back, replaced or removed.

        `new_lines` then begins at its first line again.
        """
        if not self.end or self._is_same():
            return False
        self.end, self._file, self._guard = 0, None, b""
        return True

    def _is_same(self) -> bool:
        try:
            with open_file(self.path) as file:
                if _identity(file) != self._file:
                    return False
                file.seek(self.end - len(self._guard))
                return file.read(len(self._guard)) == self._guard
        except OSError:
            return False

    def new_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield ``(offset, line)`` of every line that was finished since the last call; the line has its newline.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            with open_file(self.path) as file:
                self._file = _identity(file)
                file.seek(self.end)
                yield from self._lines(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def _lines(self, file: Any) -> Iterator[tuple[int, bytes]]:
        begun, too_long = b"", 0  # of a line whose end is not read yet; bytes of it that were dropped
        while block := file.read(BLOCK):
            *whole, begun = (begun + block).split(b"\n")
            for line in whole:
                offset, self.end = self.end, self.end + too_long + len(line) + 1
                before = b"" if too_long else self._guard
                self._guard = (before + line[-_GUARD:] + b"\n")[-_GUARD:]
                if not too_long:
                    yield offset, line + b"\n"
                too_long = 0
            if len(begun) > LONGEST:
                too_long, begun = too_long + len(begun), b""


def _identity(file: Any) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def row_of(line: bytes) -> dict[str, Any] | None:
    """Return the row that a line holds; None of a damaged one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def last_row(path: Path) -> dict[str, Any]:
    """Return the last whole row of a log without reading all of it; empty where there is none."""
    for much in (1 << 14, BLOCK):
        try:
            with open_file(path) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - much))
                *lines, _ = file.read(much).split(b"\n")
        except OSError:
            return {}
        if row := next((row for line in reversed(lines) if (row := row_of(line)) is not None), None):
            return row
    return {}
