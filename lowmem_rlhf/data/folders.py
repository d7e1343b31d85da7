"""Folders that `save_to_disk` wrote, folders in the Hub's layout, and data sets of the Hub.

No code of a data set is executed. `datasets` says which files make a split; JSON and CSV are read by our own readers,
because its own guess types.
"""

import glob
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lowmem_rlhf.data.hub_problems import hub_problem
from lowmem_rlhf.data.readers import Options, cached, file_key, read_table
from lowmem_rlhf.data.splits import read_split, say_unread
from lowmem_rlhf.data.table import DatasetTable, RowTable, Table
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import OfflineError, UserError
from lowmem_rlhf.paths import local_path, path_hint
from lowmem_rlhf.recipe.data_sources import ENDINGS, REMEDIES, ending, is_folder

_MAGIC = re.compile(r"[*?\[\]]")
# Of the options that a card may set for CSV: those that are read, or change nothing where cells are texts.
_CSV_READ = {
    *("name", "version", "data_dir", "data_files", "description", "features", "chunksize"),
    *("sep", "delimiter", "names", "column_names", "header", "quotechar", "encoding", "keep_default_na", "na_filter"),
}


def is_saved(source: str) -> bool:
    """Return whether a source is a folder that `Dataset.save_to_disk` wrote: rows without splits, as in a file."""
    folder = local_path(source)
    return is_folder(source) and all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def read_folder(source: str, config: str | None, split: str, key: str, field: str | None = None) -> Table:
    """Return one split of a folder, or of a Hub data set.

    Args:
        source: a folder that `save_to_disk` wrote, a folder of data files in the Hub's layout, or a Hub id.
        config: the configuration of the data set.
        split: the split, or parts of splits: ``train[:10%]``, ``train+test``. A folder without splits is taken whole.
        key: the recipe key that named the source, for messages: ``data.train`` or ``data.eval``.
        field: of JSON files: the key that the rows lie under.

    Raises:
        UserError: not a Hub id, no such data set, configuration or split, unreadable files, or the Hub cannot be
            reached.
    """
    folder = local_path(source)
    if not is_folder(source) and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise UserError(
            f"{key}: {source!r} is neither a file ({ENDINGS}) or folder that is there{path_hint(source)}, nor a Hub id "
            "(owner/name), nor a generated task (arithmetic, reasoning_gym/TASK)"
        )
    try:
        # The Hub's progress bars are wanted: what they stand for may take long.
        with quiet() if is_folder(source) else nullcontext():
            if is_saved(source) or (is_folder(source) and (folder / "dataset_dict.json").is_file()):
                table = _saved(folder, split)
            else:
                table = _layout(source, config, split, key, field)
    except UserError:
        raise
    except Exception as error:
        kind = OfflineError if isinstance(error, ConnectionError | TimeoutError) else UserError
        raise kind(hub_problem(error, source, config, split, key)) from error
    if len(table) == 0:
        raise UserError(f"{key}: split {split!r} of {source} has no rows; name another split")
    return table


def _saved(folder: Path, split: str) -> Table:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.Dataset):
        return DatasetTable(loaded, frozenset([str(folder.resolve())]))
    root = folder.resolve()  # each split lies in it as a folder that may be named by itself
    return read_split(lambda name: DatasetTable(loaded[name], frozenset([str(root / name)])), list(loaded), split)


def _layout(source: str, config: str | None, split: str, key: str, field: str | None) -> Table:
    """Read a split of a folder in the Hub's layout, or of the Hub."""
    import datasets

    folder = local_path(source)
    with _plain_name(folder) as (stand_in, real):
        builder = _builder(str(stand_in) if is_folder(source) else source, config)
        files = builder.config.data_files or {}
        named = {str(name): [real(file) for file in found] for name, found in files.items()}
    if is_folder(source) and builder.config.name == "default":
        say_unread(folder, tuple(file for found in named.values() for file in found), source)
    if builder.name in ("json", "csv"):
        options = _options(builder, source, key, field)

        def of_split(name: str) -> Table:
            return _files_of(named[name], source, key, builder.name, options)

        return read_split(of_split, list(named), split)
    if is_folder(source) and _MAGIC.search(str(folder.resolve())):
        escaped = {name: [glob.escape(str(file)) for file in found] for name, found in named.items()}
        loaded = datasets.load_dataset(builder.name, data_files=escaped)
    else:
        loaded = datasets.load_dataset(str(folder) if is_folder(source) else source, config)
    origins = {
        name: frozenset(str(Path(file).resolve()) if _is_local(file) else file for file in named.get(name, ()))
        for name in loaded
    }
    return read_split(lambda name: DatasetTable(loaded[name], origins[name]), list(loaded), split)


def split_files(source: str, config: str | None, split: str, key: str) -> tuple[list[str], str, Options]:
    """Return the files of a whole split of a folder or a Hub data set, their format, and how they are read.

    Returns:
        Paths, or what `fsspec` opens for files of the Hub; ``json``, ``csv`` or ``parquet``.

    Raises:
        UserError: see `read_folder`; or the files have another format.
    """
    folder = local_path(source)
    try:
        with quiet(), _plain_name(folder) as (stand_in, real):
            builder = _builder(str(stand_in) if is_folder(source) else source, config)
            named = {
                str(name): [real(file) for file in found] for name, found in (builder.config.data_files or {}).items()
            }
    except UserError:
        raise
    except Exception as error:
        kind = OfflineError if isinstance(error, ConnectionError | TimeoutError) else UserError
        raise kind(hub_problem(error, source, config, split, key)) from error
    if split not in named:
        raise UserError(
            f"{key}_split: {source!r} has no split {split!r} (it has {', '.join(named)}); set {key}_split to one that "
            "exists"
        )
    if builder.name == "parquet":
        return named[split], "parquet", Options()
    if builder.name not in ("json", "csv"):
        raise UserError(
            f"data.streaming: {source} holds files that are read as a whole ({builder.name}); streamed are JSON lines, "
            "CSV and Parquet: leave data.streaming out, or convert them"
        )
    return named[split], builder.name, _options(builder, source, key, None)


@contextmanager
def _plain_name(folder: Path) -> Iterator[tuple[Path, Callable[[str], str]]]:
    """Give a folder whose path `datasets` would take for a pattern (``[1]``) the same names under a plain path.

    Yields:
        The folder to ask for its files, and what turns the path of one into its real path.
    """
    if not folder.is_dir() or not _MAGIC.search(str(folder.resolve())):
        yield folder, str
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temp:
        root = Path(temp).resolve() / "data"
        root.mkdir()
        for found in folder.rglob("*"):
            here = root / found.relative_to(folder)
            if found.is_dir():
                here.mkdir(parents=True, exist_ok=True)
            elif found.suffix in (".md", ".yaml"):  # what describes a data set
                shutil.copy(found, here)
            else:
                here.parent.mkdir(parents=True, exist_ok=True)
                here.touch()
        try:
            yield root, lambda file: str(folder / Path(file).relative_to(root))
        except Exception as error:
            raise ValueError(str(error).replace(str(root), str(folder))) from error


def _builder(source: str, config: str | None) -> Any:
    """Return the builder of a data set; without the Hub, of what was fetched from it before."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(source, config)
        if builder.name != "cache":  # the Hub cannot be reached, and `datasets` has tables with types that it guessed
            return builder
    except (ConnectionError, TimeoutError):
        if (fetched := _fetched(source)) is None:
            raise
        return datasets.load_dataset_builder(fetched, config)
    return builder if (fetched := _fetched(source)) is None else datasets.load_dataset_builder(fetched, config)


def _fetched(source: str) -> str | None:
    """Return the folder of the Hub's cache with files of a data set, or None."""
    import huggingface_hub

    if is_folder(source):
        return None
    try:
        folder = Path(huggingface_hub.snapshot_download(source, repo_type="dataset", local_files_only=True))
    except Exception:  # none, or no valid id: the error that led here says more
        return None
    suffixes = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
    return str(folder) if any(ending(file.name) in suffixes for file in folder.rglob("*")) else None


def _options(builder: Any, source: str, key: str, field: str | None) -> Options:
    """Return how the files of a data set are read, as its card says."""
    card = builder.config
    if builder.name == "json":
        encoding = None if card.encoding == "utf-8" else card.encoding
        return Options(field=field or card.field, encoding=encoding)
    plain = type(card)()
    changed = [
        name
        for name, value in vars(card).items()
        if name not in _CSV_READ and not name.startswith("_") and value != getattr(plain, name, None)
    ]
    if changed:
        raise UserError(
            f"{key}: the card of {source} asks for a way to read CSV that is not supported ({', '.join(changed)}); "
            f"fetch its files, convert them, and give them: {key}=FILE"
        )
    names = None if card.names is None else tuple(card.names)
    if names is None and card.header is None:
        raise UserError(f"{key}: the CSV files of {source} have no header; add one, and give the file: {key}=FILE")
    # A comma is what the card says when it says nothing: a file's name and header then tell.
    separator = None if card.sep == "," else card.sep
    return Options(separator=separator, names=names, quote=card.quotechar, encoding=card.encoding)


def _files_of(files: list[str], source: str, key: str, format_: str, options: Options) -> Table:
    """Read the files of a split; rows of several are numbered on."""
    for url in files:
        if ending(url) in REMEDIES:
            raise UserError(f"{key}: {source}/{_last(url)} is not read; {REMEDIES[ending(url)]}")
    found = [(Path(url if _is_local(url) else _download(url)), f"{source}/{_last(url)}") for url in files]
    if len(found) == 1:
        return read_table(*found[0], key, format_, options)
    known = tuple(file_key(path, format_, options) for path, _ in found)
    return cached(known, lambda: _joined([read_table(*one, key, format_, options, keep=False) for one in found]))


def _joined(tables: list[Table]) -> Table:
    rows = [Row(row, number) for number, row in enumerate((row for table in tables for row in table), 1)]
    columns = list(dict.fromkeys(name for table in tables for name in table.column_names))
    return RowTable(rows, columns, frozenset().union(*(table.origins for table in tables)))


def _last(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _download(url: str) -> str:
    import datasets

    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(), record_checksums=False)
    return str(manager.download(url))


def _is_local(file: str) -> bool:
    return "://" not in file


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and error logs of `datasets` off the screen: its errors become ours."""
    import datasets

    level, bars_off = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    cards = logging.getLogger("huggingface_hub.repocard")  # says that a README describes no data set
    card_level = cards.level
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    cards.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        cards.setLevel(card_level)
        if not bars_off:
            datasets.enable_progress_bars()
