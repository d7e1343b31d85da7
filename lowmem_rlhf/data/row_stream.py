"""The rows of a source one after another, read as they are needed: what `data.streaming` learns from. No torch here.

A row is the one that `readers` and `folders` give of the same file. What is held of a file is a block: a line, some
hundred rows of CSV, a batch of a row group.
"""

import csv
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from lowmem_rlhf.data.csv_reader import read_csv, separator_of
from lowmem_rlhf.data.folders import is_saved, split_files
from lowmem_rlhf.data.json_reader import BLANK, is_lines, line_reader
from lowmem_rlhf.data.readers import Options, arrow_table, check_file
from lowmem_rlhf.data.table import Table
from lowmem_rlhf.data.text_files import BrokenFile, decompressed, decompressing, text_lines
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import RunError, UserError, one_line
from lowmem_rlhf.paths import local_path
from lowmem_rlhf.recipe.data_sources import FORMATS, ending, is_file, is_generated
from lowmem_rlhf.recipe.python_objects import is_python

_BLOCK = 500  # rows of CSV or Parquet that are read at once

Values = Generator[Mapping[str, Any], None, int]  # rows; at the end, of the rows to skip those that are left


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
        place: its path, or what `fsspec` opens (``hf://...``).
        name: what it is called in messages; its ending is looked at.
        format_: ``json``, ``csv`` or ``parquet``.
        options: how it is read.
    """

    place: str
    name: str
    format_: str
    options: Options

    @property
    def origin(self) -> str:
        """What the tables of `readers` and `folders` call it among their origins."""
        return self.place if "://" in self.place else str(Path(self.place).resolve())

    def open(self) -> IO[bytes]:
        """Open it; of the Hub no more is fetched than is read."""
        if "://" not in self.place:
            return Path(self.place).open("rb")
        import fsspec

        opened: IO[bytes] = fsspec.open(self.place, "rb").open()
        return opened


class RowStream:
    """The rows of a source, from files or a table that lies on the disk.

    Args:
        key: the recipe key that named the source, for messages.
    """

    def __init__(self, key: str, files: Sequence[SourceFile], table: Table | None = None) -> None:
        self._key, self._files, self._table = key, files, table
        self.origins = frozenset(file.origin for file in files) if table is None else table.origins

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Go through the rows from a place, from 0; a row's number is its place from 1.

        Raises:
            UserError: a file cannot be read.
            RunError: it cannot be fetched from where it lies.
        """
        if self._table is not None:
            for first in range(start, len(self._table), _BLOCK):
                places = range(first, min(first + _BLOCK, len(self._table)))
                yield from (Row(row, place + 1) for place, row in zip(places, self._table.rows(places), strict=True))
            return
        number, skip = start, start
        for file in self._files:
            values = _values(file, skip)
            while True:
                try:
                    row = next(values)
                except StopIteration as end:
                    skip = end.value
                    break
                except BrokenFile as error:
                    raise UserError(f"{self._key}: {file.name} cannot be read: {error}") from error
                except OSError as error:
                    why = error.strerror or one_line(error)
                    raise UserError(f"{self._key}: {file.name} cannot be read: {why}") from error
                except Exception as error:
                    if "://" not in file.place:
                        raise
                    raise RunError(f"{self._key}: {file.name} cannot be fetched: {one_line(error)}") from error
                number += 1
                yield Row(row, number)


def open_stream(source: str, config: str | None, split: str, key: str, table: Callable[[], Table]) -> RowStream:
    """Return the rows of a source as a stream.

    Args:
        source, config, split: as of `read_folder`; or a file.
        key: the recipe key that named the source, for messages: ``data.train`` or ``data.eval``.
        table: gives them as a table, where they lie on the disk as one or a program holds them.

    Raises:
        UserError: the source is none that can be streamed, or is not there.
    """
    if is_generated(source):
        raise UserError(f"data.streaming: {source} is generated and lies on no disk; leave data.streaming out")
    if is_python(source) or is_saved(source):
        return RowStream(key, [], table())
    if is_file(source):
        path = check_file(source, key)
        return RowStream(key, [SourceFile(str(path), source, FORMATS[ending(source)], Options())])
    if any(sign in split for sign in "[+"):
        raise UserError(
            f"{key}_split: got {split!r}, and parts of splits are known only once all is read; name a whole split, or "
            "leave data.streaming out"
        )
    if (local_path(source) / "dataset_dict.json").is_file():
        return RowStream(key, [], table())
    found, format_, options = split_files(source, config, split, key)
    names = [f"{source}/{place.rsplit('/', 1)[-1]}" for place in found]
    return RowStream(key, [SourceFile(*one, format_, options) for one in zip(found, names, strict=True)])


def _values(file: SourceFile, skip: int) -> Values:
    """Go through the rows of a file behind those that are skipped."""
    with file.open() as raw:
        if file.format_ == "parquet":
            return (yield from _parquet(raw, skip))
        with decompressing():  # already the first bytes, which tell the encoding, may be damaged
            content = decompressed(raw, file.name)
            rows = _json if file.format_ == "json" else _csv
            return (yield from rows(content, file, skip))


def _json(content: IO[bytes], file: SourceFile, skip: int) -> Values:
    if content.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise BrokenFile(_ONE_DOCUMENT)
    content.seek(0)
    read = line_reader()
    lines = text_lines(content, file.options.encoding)
    numbered = ((number, text) for number, line in enumerate(lines, 1) if (text := line.strip(BLANK + "\n")))
    first = list(islice(numbered, 2))
    if first and not is_lines([line for _, line in first], ending(file.name) in (".jsonl", ".ndjson")):
        raise BrokenFile(_ONE_DOCUMENT)
    for number, line in chain(first, numbered):
        if skip:
            skip -= 1
        else:
            yield read(number, line)
    return skip


_ONE_DOCUMENT = (
    "it is one JSON document, which is read as a whole; write it as JSON lines (a row a line) to stream it, or leave "
    "data.streaming out"
)


def _csv(content: IO[bytes], file: SourceFile, skip: int) -> Values:
    options, usual = file.options, "\t" if ending(file.name) == ".tsv" else ","
    sure = options.separator is not None and options.separator != usual
    blocks = _csv_blocks(text_lines(content, options.encoding, newline=""), options, usual, sure)
    number = 0
    for block in blocks:
        try:
            _, rows, _ = read_csv(block, options.separator or usual, sure, options.names, options.quote)
        except BrokenFile as error:
            raise BrokenFile(f"{f'in the rows behind the first {number:,}, ' if number else ''}{error}") from error
        number += len(rows)
        yield from rows[skip:]
        skip = max(0, skip - len(rows))
    return skip


def _csv_blocks(lines: Iterator[str], options: Options, usual: str, sure: bool) -> Iterator[str]:
    """Cut CSV text between rows; each block begins with the header, so that it can be read by itself."""
    taken: list[str] = []
    before = []  # Excel's line of the separator, and the lines up to the header
    for line in lines:
        before.append(line)
        if line.strip() and not line.lower().lstrip('"').startswith("sep="):
            break
    if not before:
        return
    separator = separator_of("".join(before), options.separator or usual, sure)

    def noted() -> Iterator[str]:
        for line in chain(before[-1:], lines):
            taken.append(line)
            yield line

    head, rows = "".join(before[:-1]), 0
    has_header = options.names is None
    try:
        csv.field_size_limit(_LONGEST_CELL)
        for row in csv.reader(noted(), delimiter=separator, quotechar=options.quote, strict=True):
            if not row:
                continue
            if has_header:
                head, has_header = head + "".join(taken), False
                taken.clear()
                continue
            rows += 1
            if rows % _BLOCK == 0:
                yield head + "".join(taken)
                taken.clear()
    except csv.Error as error:
        raise BrokenFile(f"behind row {rows:,}: {error}; quotes inside of a quoted cell are doubled") from error
    if any(line.strip() for line in taken):
        yield head + "".join(taken)


_LONGEST_CELL = 2**27  # characters; a quote that is never closed would hold the rest of the file in memory


def _parquet(raw: IO[bytes], skip: int) -> Values:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(raw)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if skip >= count:
                skip -= count
                continue
            for batch in file.iter_batches(_BLOCK, row_groups=[group]):
                part = pa.Table.from_batches([batch])
                part.validate(full=True)
                table = arrow_table(part, frozenset())
                yield from table.rows(range(min(skip, len(table)), len(table)))
                skip = max(0, skip - len(table))
    except pa.ArrowException as error:
        raise BrokenFile(one_line(error)) from error
    return skip
