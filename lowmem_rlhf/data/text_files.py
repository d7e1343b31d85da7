"""From the bytes of a file to its text: compression and encodings. What cannot be read is said with the remedy."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Any

from lowmem_rlhf.recipe.data_sources import COMPRESSIONS

_MAGIC: list[tuple[bytes, str, Callable[[bytes], bytes]]] = [
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\x00", "xz", lzma.decompress),
]
_LFS = b"version https://git-lfs.github.com/spec/"
# The mark of UTF-32 (little-endian) begins as that of UTF-16 does, so it is looked for first.
_MARKS = [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]
# Which of its first four bytes are not zero, in a text that begins with plain letters.
_WIDE: dict[tuple[bool, ...], str] = {
    (True, False, False, False): "UTF-32LE",
    (False, False, False, True): "UTF-32BE",
    (True, False, True, False): "UTF-16LE",
    (False, True, False, True): "UTF-16BE",
}


_CONVERT = "save it as UTF-8, or convert it, where it was written on Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"


class BrokenFile(ValueError):
    """What a file holds cannot be read as what it should be. The message is a clause that goes on after a colon."""


class NoRows(BrokenFile):
    """A file that can be read, and holds no row."""


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed where it begins as a gzip, bzip2 or xz file does.

    Raises:
        BrokenFile: the compressed data are damaged or end too early, or the file is a stand-in of Git LFS.
        OSError: the file cannot be opened.
    """
    content = path.read_bytes()
    if content.startswith(_LFS):
        raise BrokenFile("it is a pointer of Git LFS, and not the file itself; run `git lfs pull` in its folder")
    for magic, name, decompress in _MAGIC:
        if content.startswith(magic):
            try:
                return decompress(content)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise BrokenFile(f"its {name} data are damaged or end too early ({error}); fetch it again") from error
    if path.suffix.lower() in COMPRESSIONS and content:
        raise BrokenFile(
            f"it is not compressed as its ending {path.suffix} says; rename it without {path.suffix}, or fetch it again"
        )
    return content


def decode(content: bytes, encoding: str | None = None) -> str:
    """Return the text of bytes: UTF-8, or what a byte order mark says (UTF-8, -16, -32), or the encoding given.

    Raises:
        BrokenFile: it is something else; the message names line and byte, and how the file is converted.
    """
    mark, name = _mark_and_name(content, encoding)
    body = content[len(mark) :]
    try:
        return body.decode(name).lstrip("\ufeff")  # a mark that was put before another one
    except UnicodeDecodeError as error:
        if name != "utf-8":
            raise BrokenFile(
                f"it is not {name.upper()} text, as its {'byte order mark' if mark else 'data set'} says "
                f"(byte {error.start + len(mark)}); save it as UTF-8"
            ) from error
        line = body.count(b"\n", 0, error.start) + 1
        raise BrokenFile(
            f"it is not UTF-8 text (line {line}, byte {error.start + len(mark)} of the file is "
            f"0x{body[error.start]:02x}); {_CONVERT}"
        ) from error
    except LookupError as error:
        raise BrokenFile(f"its encoding {name!r} is not known; save it as UTF-8") from error


def _mark_and_name(content: bytes, encoding: str | None) -> tuple[bytes, str]:
    """Return the byte order mark that a text begins with, perhaps none, and its encoding."""
    mark, name = next((found for found in _MARKS if content.startswith(found[0])), (b"", encoding or "utf-8"))
    if not mark and encoding is None and (found := _WIDE.get(tuple(byte > 0 for byte in content[:4]))):
        raise BrokenFile(
            f"it is not UTF-8 text but looks like {found} without a byte order mark; convert it: "
            f"iconv -f {found} -t UTF-8 OLD > NEW"
        )
    return mark, name


def decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """Return an open file, which can seek, as what it holds once it is decompressed; it is read as it is needed.

    Raises:
        BrokenFile: it is a stand-in of Git LFS, or not compressed as its ending says.
    """
    first = file.read(len(_LFS))
    file.seek(0)
    if first.startswith(_LFS):
        raise BrokenFile("it is a pointer of Git LFS, and not the file itself; run `git lfs pull` in its folder")
    openers: list[Callable[[IO[bytes]], Any]] = [gzip.open, bz2.open, lzma.open]
    for (magic, _, _), opened in zip(_MAGIC, openers, strict=True):
        if first.startswith(magic):
            stream: IO[bytes] = opened(file)
            return stream
    if PurePath(name).suffix.lower() in COMPRESSIONS and first:
        raise BrokenFile(f"it is not compressed as its ending {PurePath(name).suffix} says; fetch it again")
    return file


@contextmanager
def decompressing() -> Iterator[None]:
    """Tell by `BrokenFile` that what is read of `decompressed` in the block is damaged."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise BrokenFile(f"its compressed data are damaged or end too early ({error}); fetch it again") from error


def text_lines(file: IO[bytes], encoding: str | None = None, newline: str = "\n") -> Iterator[str]:
    """Go through the lines of a text as they are needed, each with its end; encodings are those of `decode`.

    Args:
        newline: as of `open`: what ends a line, or empty: any end.

    Raises:
        BrokenFile: it is no such text.
    """
    mark, name = _mark_and_name(file.read(4), encoding)
    file.seek(len(mark))
    number = 0
    try:
        for number, line in enumerate(io.TextIOWrapper(file, encoding=name, newline=newline), 1):  # noqa: B007
            yield line
    except UnicodeDecodeError as error:
        raise BrokenFile(f"it is not {name.upper()} text (behind line {number}); {_CONVERT}") from error
    except LookupError as error:
        raise BrokenFile(f"its encoding {name!r} is not known; save it as UTF-8") from error
