"""The text files of a run that it computes from: recipe.yaml, plan.json, inputs.json, evaluation.json. No torch here.

A user may read and edit them, so their hashes lie beside them, in the run's hashes.json. While a file is written, the
hash of the one before (empty: there was none) is known with its own, so that a kill in between leaves a file that is
known. Line ends do not count.
"""

import hashlib
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import atomic_write
from lowmem_rlhf.run.proof import FORMAT, HASHES, Damaged, read_sealed, seal


def write_text_file(folder: Path, name: str, content: str) -> None:
    """Write a text file of a run whole or not at all, so that a change by anything else is noticed."""
    known = known_hashes(folder)
    now = _hash(content.encode("utf-8", "backslashreplace"))
    _write_hashes(folder, {**known, name: [_hash_of(folder / name), now]})
    atomic_write(folder / name, content)
    _write_hashes(folder, {**known, name: [now]})


def adopt_text_files(folder: Path, names: tuple[str, ...]) -> None:
    """Take over the files that no hash is known of: those of a run of before, or of one whose hashes are gone."""
    known = known_hashes(folder)
    found = {name: [digest] for name in names if name not in known and (digest := _hash_of(folder / name))}
    if found:
        _write_hashes(folder, {**known, **found})


def changed_text_files(folder: Path) -> list[str]:
    """Return the names of the files that something else than the run has changed or removed."""
    return [name for name, hashes in known_hashes(folder).items() if _hash_of(folder / name) not in hashes]


def hashes_damaged(folder: Path) -> bool:
    """Whether there is a hashes.json, and it is not what was written."""
    if not (folder / HASHES).exists():
        return False
    try:
        return not read_sealed(folder / HASHES)[1]
    except (Damaged, UserError):
        return True


def known_hashes(folder: Path) -> dict[str, list[str]]:
    """Return the hashes that a file may have, by its name; nothing where hashes.json is gone or damaged."""
    try:
        values: Any = read_sealed(folder / HASHES)[0].get("files")
    except (Damaged, UserError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: hashes for name, hashes in values.items() if isinstance(hashes, list) and Path(name).name == name}


def _write_hashes(folder: Path, files: dict[str, list[str]]) -> None:
    atomic_write(folder / HASHES, seal({"format": FORMAT, "files": files}))


def _hash_of(file: Path) -> str:
    """Return a file's hash; nothing where it cannot be read."""
    try:
        return _hash(file.read_bytes())
    except OSError:
        return ""


def _hash(data: bytes) -> str:
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()
