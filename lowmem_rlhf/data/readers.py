"""Reading a local file exactly as it is: which one is meant, what format it has, and what stands in the way."""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.data.csv_reader import read_csv
from lowmem_rlhf.data.json_reader import read_json
from lowmem_rlhf.data.table import ArrowTable, DatasetTable, RowTable, Table
from lowmem_rlhf.data.text_files import BrokenFile, NoRows, decode, read_bytes
from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.paths import local_path, obstacle, path_hint
from lowmem_rlhf.recipe.data_sources import COMPRESSIONS, ENDINGS, FORMATS, REMEDIES, ending
from lowmem_rlhf.suggest import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_SMALL = 1000  # bytes; a file below may be a pointer to the real one, which `read_bytes` sees
_KEPT = 2  # tables: that of the training rows and that of the held-out rows


@dataclass(frozen=True)
class Options:
    """How a file is read, beyond what its name and content say."""

    field: str | None = None  # of JSON: the key that the rows lie under
    separator: str | None = None  # of CSV
    names: tuple[str, ...] | None = None  # of CSV without a header: its columns
    quote: str = '"'  # of CSV
    encoding: str | None = None  # of a text without byte order mark


_tables: OrderedDict[Any, Table] = OrderedDict()


def cached(key: Any, read: Callable[[], Table]) -> Table:
    """Return what was read under a key, or read it; the last two tables are kept."""
    if key not in _tables:
        _tables[key] = read()
    _tables.move_to_end(key)
    while len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return _tables[key]


def read_file(source: str, key: str, field: str | None = None) -> Table:
    """Return the rows of a local file, held in memory: JSON, JSON lines, CSV, TSV or Parquet, perhaps compressed.

    A file that has not changed since it was read is not read again.

    Args:
        source: the path.
        key: the recipe key that named it, for messages: ``data.train`` or ``data.eval``.
        field: of JSON: the key that the rows lie under.

    Raises:
        UserError: there is no such file, it has another format, cannot be read, or holds no rows.
    """
    path = check_file(source, key)
    return read_table(path, source, key, FORMATS[ending(source)], Options(field=field))


def check_file(source: str, key: str) -> Path:
    """Return the path of a local file of rows.

    Raises:
        UserError: there is no such file, or it has another format.
    """
    path = local_path(source)
    if why := obstacle(path):
        raise UserError(f"{key}: {source} {why}; give a file that holds rows ({ENDINGS})")
    if not os.path.isfile(path):
        raise UserError(f"{key}: there is no file {source}{_nearest(path)}{path_hint(source)}")
    if ending(source) not in FORMATS:
        raise UserError(f"{key}: {source} {_not_read(ending(source))}")
    return path


def file_key(path: Path, format_: str, options: Options) -> tuple[Any, ...]:
    """Return what is the same as long as a file and how it is read are."""
    about = path.stat()
    return (str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino, format_, options)


def read_table(path: Path, name: str, key: str, format_: str, options: Options, keep: bool = True) -> Table:
    """Return the rows of a file of a known format: ``json``, ``csv`` or ``parquet``.

    Args:
        path: the file.
        name: what it is called in messages; its ending is looked at.
        key: the recipe key that named it.
        format_: the format.
        options: how it is read.
        keep: whether it is kept for the next time.

    Raises:
        UserError: it cannot be read, or holds no rows.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{key}: {name} is empty; it must hold at least one row")
        if not keep:
            return _read(path, name, format_, options)
        return cached(file_key(path, format_, options), lambda: _read(path, name, format_, options))
    except NoRows as error:
        raise UserError(f"{key}: {name} has no rows; it must hold at least one") from error
    except BrokenFile as error:
        raise UserError(f"{key}: {name} cannot be read: {error}") from error
    except OSError as error:
        raise UserError(f"{key}: {name} cannot be read: {error.strerror or one_line(error)}") from error


def _read(path: Path, name: str, format_: str, options: Options) -> Table:
    if format_ == "parquet":
        return _read_parquet(path)
    origin = frozenset([str(path.resolve())])
    text = decode(read_bytes(path), options.encoding)
    if format_ == "json":
        rows, note = read_json(text, name, options.field, ending(name) in (".jsonl", ".ndjson"))
        table = RowTable(rows, origins=origin)
    else:
        usual = "\t" if ending(name) == ".tsv" else ","
        sure = options.separator is not None and options.separator != usual
        names, rows, note = read_csv(text, options.separator or usual, sure, options.names, options.quote)
        table = RowTable(rows, names, origin)
    if not len(table):
        raise NoRows("it has no rows")
    if note:
        logger.warning("%s: %s", name, note)
    return table


def _read_parquet(path: Path) -> Table:
    """Read a Parquet file from its bytes: the folders in its path (``year=2024``) are no columns of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() in COMPRESSIONS or path.stat().st_size < _SMALL:
            table = pq.ParquetFile(pa.BufferReader(read_bytes(path))).read()
        else:
            with path.open("rb") as file:
                table = pq.ParquetFile(file).read()
        table.validate(full=True)  # text that is not UTF-8 would otherwise fail at some later row
    except pa.ArrowException as error:
        raise BrokenFile(one_line(error)) from error
    return arrow_table(table, frozenset([str(path.resolve())]))


def arrow_table(table: "pa.Table", origins: frozenset[str]) -> Table:
    """Return an Arrow table, or a part of one, as the rows of its file.

    Raises:
        BrokenFile: two of its columns have one name.
    """
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BrokenFile(f"two columns have the name {twice!r}; give each column its own")
    if b"huggingface" in (table.schema.metadata or {}):  # `datasets` wrote it, and knows more of its types
        from datasets import Dataset
        from datasets.table import InMemoryTable

        return DatasetTable(Dataset(InMemoryTable(table)), origins)
    return ArrowTable(_texts_of_bytes(table), origins)


def _texts_of_bytes(table: "pa.Table") -> "pa.Table":
    """Turn columns of bytes that are UTF-8 into texts: some programs write texts without saying that they are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for place, field in enumerate(table.schema):
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            with suppress(pa.ArrowInvalid):
                table = table.set_column(place, field.name, pc.cast(table.column(place), pa.large_string()))
    return table


def _nearest(path: Path) -> str:
    folder = path.parent
    if not os.path.isdir(folder):
        return f"; there is no folder {folder} either"
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"; the folder {folder} cannot be looked into ({error.strerror})"
    if hint := did_you_mean(path.name, names):
        return hint
    same = [name for name in names if name.split(".")[0] == path.name.split(".")[0]]
    return f"; did you mean {same[0]!r}?" if same else ""


def _not_read(suffix: str) -> str:
    if suffix in REMEDIES:
        return f"is not read ({suffix}); {REMEDIES[suffix]} (read are: {ENDINGS}, also with {', '.join(COMPRESSIONS)})"
    return f"ends in {suffix or 'nothing'}; convert it to one of {ENDINGS} (what the file holds must match its ending)"


def same_file(one: str, other: str) -> bool:
    """Whether two sources are one local file or folder, through links or other spellings too."""
    first, second = local_path(one), local_path(other)
    try:
        return os.path.samefile(first, second)
    except OSError:
        return first.resolve() == second.resolve()
