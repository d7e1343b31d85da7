"""What ``data.train`` and ``data.eval`` name: a generated task, a local file, a folder or a set of the Hub."""

import os
from pathlib import PurePath

from lowmem_rlhf.paths import local_path

ARITHMETIC = "arithmetic"
REASONING_GYM = "reasoning_gym/"
COMPRESSIONS = (".gz", ".bz2", ".xz")
FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
ENDINGS = ".jsonl, .json, .csv, .tsv, .parquet"
_ARROW = "name the folder that save_to_disk wrote, or convert it with datasets.Dataset.from_file(FILE).to_parquet(NEW)"
_PANDAS = "load it where it was made and write it with DataFrame.to_parquet or to_json(orient='records', lines=True)"
_PICKLE = f"it may be a pickle, and reading one runs what others put there; {_PANDAS}"
_SHEET = "save the sheet as CSV UTF-8 and give that"
_UNPACK = "unpack it and give the file that was in it"
# What to do with files that people have, and that are not read.
REMEDIES = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
    ".zst": "unpack it with `unzstd` (or compress it with gzip)",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), _SHEET),
    **dict.fromkeys((".feather", ".h5"), _PANDAS),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".ckpt", ".bin"), _PICKLE),
    ".arrow": _ARROW,
    ".txt": 'write each text as a line {"text": "..."} of a .jsonl file, with data.text=text',
    ".md": 'write each text as a line {"text": "..."} of a .jsonl file, with data.text=text',
    ".yaml": "write its rows as JSON",
    ".yml": "write its rows as JSON",
    ".xml": "write its rows as JSON",
    ".db": "export the table as CSV",
    ".sqlite": "export the table as CSV",
}


def is_generated(source: str) -> bool:
    """Return whether a data source is a generated task rather than a file or a Hub id."""
    return source == ARITHMETIC or source.startswith(REASONING_GYM)


def ending(name: str) -> str:
    """Return the ending of a file name in small letters, without one of a compression: ``.jsonl`` of ``a.jsonl.gz``."""
    path = PurePath(name.replace("\\", "/"))
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix.lower()


def is_file(source: str) -> bool:
    """Return whether a data source names a local file (one that exists, or one with a file's ending)."""
    path = local_path(source)
    if os.path.isdir(path):  # os.path: a name that is too long, or a folder that may not be entered, is no error
        return False
    return os.path.isfile(path) or ending(source) in FORMATS or ending(source) in REMEDIES


def is_folder(source: str) -> bool:
    """Return whether a data source names a folder that is there."""
    return bool(source.strip()) and os.path.isdir(local_path(source))
