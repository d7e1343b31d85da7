"""Files that prove themselves: SHA-256 and size of every file of a folder, in a JSON file that proves itself too.

That file ends with ``"sha256"``, the hash of its own text without that key. A folder whose proof fails is damaged: a
bit flipped, a block lost, a file swapped with another checkpoint's or role's, or an editor was there. No torch here.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.files import is_temp

FORMAT = 1  # of the files that prove a folder
HASHES = "hashes.json"  # proves adapter/, and in a run's folder its recipe, plan, inputs and results
_LARGEST = 64 << 20  # bytes of such a file; a real one has kilobytes
_END = re.compile(rb', "sha256": "([0-9a-f]{64})"}\s*\Z')
_WEIGHTS = {".safetensors", ".json"}  # what is read of a folder, and so needs a hash


class Damaged(Exception):
    """A file is not what was written. The message names it, without its folder."""


def seal(values: dict[str, Any]) -> str:
    """Return values (at least one) as JSON that proves itself."""
    text = json.dumps(values)
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the values of a JSON file, and whether it proved itself; one without any proof may be of before.

    Raises:
        Damaged: it is gone, no JSON object, or not what was written.
        UserError: it may not be read, or a newer version wrote it.
    """
    data = _read(path)
    end = _END.search(data)
    proven = end is not None and hashlib.sha256(data[: end.start()] + b"}").hexdigest() == end[1].decode()
    if end is not None and not proven:
        raise Damaged(f"{path.name} is not what was written")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is not JSON ({one_line(error)[:200]})") from error
    if not isinstance(values, dict):
        raise Damaged(f"{path.name} is not a JSON object")
    if not proven and {"format", "files", "sha256"} & values.keys():
        raise Damaged(f"{path.name} is not what was written")
    values.pop("sha256", None)
    if proven and (not isinstance(values.get("format"), int) or values["format"] > FORMAT):
        raise UserError(
            f"{path} was written by a newer version of lowmem-rlhf (format {values.get('format')!r}, this one reads "
            f"{FORMAT}); update lowmem-rlhf"
        )
    return values, proven


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: there is no permission to; give yourself the right to read it") from (
            error
        )
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror or error})") from error


def _read(path: Path) -> bytes:
    with _reading(path, path.name):
        if path.stat().st_size > _LARGEST:
            raise Damaged(f"{path.name} is far too large ({path.stat().st_size:,} bytes)")
        return path.read_bytes()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, proof: str) -> dict[str, dict[str, Any]]:
    """Return ``sha256`` and ``bytes`` of every file below a folder but its proof, by its path with slashes."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_hash(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / proof
    }


def check_files(folder: Path, proof: str, files: Any) -> None:
    """Hold a folder's files against what `hash_files` gave.

    Raises:
        Damaged: a file is missing or another one, or one that would be read has no hash.
        UserError: one may not be read.
    """
    if not isinstance(files, dict):
        raise Damaged(f"{proof} names no files")
    for name, entry in files.items():
        _check_file(folder, name, entry)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in _WEIGHTS and name not in files and name != proof and not is_temp(path) and path.is_file():
            raise Damaged(f"{name} is not one of the files that were written")


def _check_file(folder: Path, name: str, entry: Any) -> None:
    path = folder / name
    if not isinstance(entry, dict) or ".." in Path(name).parts or Path(name).is_absolute():
        raise Damaged(f"the entry of {name} is not what was written")
    with _reading(path, name):
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise Damaged(f"{name} has {size:,} bytes, and {entry.get('bytes')} were written")
        if file_hash(path) != entry.get("sha256"):
            raise Damaged(f"{name} is not what was written")


def write_hashes(folder: Path) -> None:
    """Write hashes.json, which proves the files of a folder."""
    (folder / HASHES).write_text(seal({"format": FORMAT, "files": hash_files(folder, HASHES)}), encoding="utf-8")
