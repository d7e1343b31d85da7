"""Files that appear whole or not at all, and logs that grow by lines. Windows too; no torch here."""

import json
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, then renamed over it."""
    # A lone surrogate (half of a character, cut by a token limit) becomes its JSON escape instead of an error.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temp = temp_path(path)
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(temp, path)
    except BaseException:
        with suppress(OSError):
            temp.unlink()
        raise


def temp_path(path: Path) -> Path:
    """Return the name under which ``path`` is written until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def is_temp(path: Path) -> bool:
    """Whether a name is one of :func:`temp_path`."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _replace(source: Path, target: Path) -> None:
    """Rename; on Windows wait for a virus scanner or an editor that has the file open for a moment."""
    for delay in (0.05, 0.2, 0.5, 1.0) if os.name == "nt" else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(delay)
    os.replace(source, target)


def begin_folder(target: Path) -> Path:
    """Return an empty temporary folder beside ``target``; :func:`finish_folder` makes it appear."""
    temp = temp_path(target)
    delete(temp)
    temp.mkdir(parents=True)
    return temp


def finish_folder(target: Path) -> Path:
    """Sync what was written since :func:`begin_folder` and rename it to ``target``, replacing an older one."""
    temp = temp_path(target)
    for file in temp.rglob("*"):
        if file.is_file():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
    delete(target)
    _replace(temp, target)
    return target


def delete(path: Path) -> None:
    """Delete a file or folder; a folder is renamed first, so that a half-deleted one never looks finished."""
    if path.is_dir() and not path.is_symlink():
        trash = path if is_temp(path) else path.with_name(f".{path.name}.old.tmp")
        if trash != path:
            shutil.rmtree(trash, ignore_errors=True)
            _replace(path, trash)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append one JSON object a line."""
    text = "".join(dumps(row) + "\n" for row in rows)
    with path.open("ab") as file:  # opened for each step: Windows cannot rename over an open file
        file.write(text.encode("utf-8", "backslashreplace"))
        file.flush()


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return ``(line, row)`` of every whole line; a torn last line is left out.

    Raises:
        UserError: a line before the last is not JSON.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    found = []
    # What follows the last newline was torn by a kill, even if it reads as JSON (a number may be cut).
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise UserError(f"{path}, line {number} is not JSON ({error}); delete that line") from error
        if isinstance(row, dict):
            found.append((line, row))
    return found


def dumps(value: Any, indent: int | None = None) -> str:
    """Return JSON; a number that is not finite becomes null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """Return JSON values: null for a number that is not finite, Python numbers for scalars of NumPy and torch."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return _plain(value.item()) if hasattr(value, "item") else value
