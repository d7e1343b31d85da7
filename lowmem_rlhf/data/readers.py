"""Reading a local file or a Hub data set with `datasets`. No code of a data set is executed."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.suggest import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def is_file(source: str) -> bool:
    """Return whether a data source names a local file (one that exists, or one with a known ending)."""
    path = Path(source).expanduser()
    return path.suffix.lower() in FORMATS or path.is_file()


def read_file(source: str, key: str) -> "Dataset":
    """Return the rows of a local .jsonl, .json, .csv or .parquet file, held in memory.

    Args:
        source: the path.
        key: the recipe key that named it, for messages: ``data.train`` or ``data.eval``.

    Raises:
        UserError: there is no such file, it has another format, cannot be read, or holds no rows.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{key}: there is no file {source}{did_you_mean(path.name, siblings)}")
    if path.suffix.lower() not in FORMATS:
        raise UserError(
            f"{key}: {source} ends in {path.suffix or 'nothing'}; convert it to one of {', '.join(FORMATS)} "
            "(what the file holds must match its ending)"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{key}: {source} is empty; it must hold at least one row")
    import datasets

    # Read into memory: a copy in the user's cache would outlive the run for a file that is already on this disk.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache, _quiet():
        try:
            rows = datasets.load_dataset(
                FORMATS[path.suffix.lower()],
                data_files=str(path),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            )
            rows.data.validate(full=True)  # text that is not UTF-8 would otherwise fail at some later row
        except Exception as error:
            if "corresponds to no data" in str(error):
                raise UserError(f"{key}: {source} has no rows; it must hold at least one") from error
            raise UserError(f"{key}: {source} cannot be read: {_reason(path, error)}") from error
    if len(rows) == 0:
        raise UserError(f"{key}: {source} has no rows; it must hold at least one")
    return rows


def read_hub(source: str, config: str | None, split: str, key: str) -> "Dataset":
    """Return one split of a Hub data set (or of a folder of data files in the Hub's layout).

    Raises:
        UserError: not a Hub id, no such data set, configuration or split, or the Hub cannot be reached.
    """
    if not Path(source).expanduser().is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise UserError(
            f"{key}: {source!r} is neither a file ({', '.join(FORMATS)}), nor a Hub id (owner/name), nor a generated "
            "task (arithmetic, reasoning_gym/TASK)"
        )
    import datasets

    try:
        rows = datasets.load_dataset(source, config, split=split)
    except Exception as error:
        raise UserError(_hub_problem(error, source, config, split, key)) from error
    if len(rows) == 0:
        raise UserError(f"{key}: split {split!r} of {source} has no rows; name another split")
    return rows


def _hub_problem(error: Exception, source: str, config: str | None, split: str, key: str) -> str:
    from datasets.exceptions import DatasetNotFoundError

    text = _one_line(error)
    if isinstance(error, DatasetNotFoundError):
        return (
            f"{key}: there is no data set {source!r} on the Hub that this machine may read ({text}); check the id, log "
            f"in with `hf auth login` if it is private or gated, or give a local file: {key}=PATH"
        )
    if isinstance(error, ConnectionError | TimeoutError):
        return (
            f"{key}: {source!r} is no file here and the Hub cannot be reached for it ({text}); connect once to fill "
            f"the cache, or download the data elsewhere and give the file: {key}=PATH"
        )
    if "nknown split" in text or "corresponds to no data" in text:
        remedy = (
            ""
            if key == "data.train"
            else "; or set it to data.train_split to hold rows out of training, or data.eval_size=0"
        )
        return f"{key}_split: {source!r} has no split {split!r} ({text}); set {key}_split to one that exists{remedy}"
    if "BuilderConfig" in text or "Config name is missing" in text:
        return f"data.config: got {config!r} for {source!r}, which is not one it has ({text}); set data.config"
    return f"{key}: {source!r} cannot be loaded from the Hub: {text}; a local file works too: {key}=PATH"


def _reason(path: Path, error: Exception) -> str:
    if FORMATS[path.suffix.lower()] == "json":
        return _bad_json(path) or _one_line(error.__cause__ or error)
    return _one_line(error.__cause__ or error)


def _bad_json(path: Path) -> str:
    """Return where a JSON or JSON-lines file breaks; an empty string when it does not."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text (byte {error.start})"
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno} is not JSON: {error.msg} (column {error.colno})"
        return ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"line {number} is not JSON: {error.msg} (column {error.colno})"
        if not isinstance(row, dict):
            return f"line {number} is not a JSON object with a value for each column"
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars and error logs of `datasets` off the screen: its errors become ours."""
    import datasets

    level, bars_off = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars_off:
            datasets.enable_progress_bars()
