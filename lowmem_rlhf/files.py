"""Files that appear whole or not at all, and logs that grow by lines. Windows too; no torch here.

The functions raise what the system raises; `writing` makes one sentence of it, at the places that know what is written.
"""

import errno
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import LowmemError, RunError, UserError, one_line

# what the system says, and what can be done about it
_CAUSES = {
    errno.ENOSPC: ("the disk is full", "make room there"),
    getattr(errno, "EDQUOT", -1): ("your quota of the disk is used up", "make room there"),
    errno.EROFS: ("the disk is read-only", "choose a folder on another disk"),
    errno.EACCES: ("there is no permission to", "give yourself the right to write there, or choose another folder"),
    errno.EPERM: ("it is not permitted", "give yourself the right to write there, or choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter path"),
    errno.EFBIG: ("the file would be larger than allowed", "raise the limit (ulimit -f), or choose another disk"),
    errno.EIO: ("the disk failed", "check the disk, or choose a folder on another one"),
}
# how the libraries in Rust (safetensors, tokenizers) tell the system's number
_RUST = re.compile(r"\b(?:code: |os error )(\d+)")


@contextmanager
def writing(path: object, error_type: type[LowmemError] = RunError, remedy: str = "") -> Iterator[None]:
    """Let a fault of the disk or the file system inside the block become one sentence.

    Args:
        path: what is written, as the user is to read it.
        error_type: `UserError` where nothing has begun.
        remedy: what else to do, the end of the sentence; for example "then go on with --resume".

    Raises:
        LowmemError: of that type, where the system refused to write.
    """
    try:
        yield
    except LowmemError:
        raise
    except Exception as error:
        if (number := fault_number(error)) is None:
            raise
        raise error_type(f"{path} cannot be written: {why_not_written(error, number, remedy)}") from error


def fault_number(error: Exception) -> int | None:
    """Return the system's number of a fault (0: unknown), of an error of Python or of a library in Rust; else None."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _RUST.search(str(error))
    return int(found[1]) if found else None


def why_not_written(error: Exception, number: int | None = None, remedy: str = "") -> str:
    """Return why the system refused to write, and what to do."""
    number = fault_number(error) if number is None else number
    cause, first = _CAUSES.get(number or 0, (one_line(error), "look at the disk and the folder"))
    return f"{cause}; {first}{f', {remedy}' if remedy else ''}"


def check_room(path: Path, needed: int, remedy: str = "") -> None:
    """Check that so many bytes are free on the disk of a path.

    Raises:
        RunError: they are not.
    """
    nearest = next((one for one in (path, *path.absolute().parents) if one.exists()), None)
    if nearest is None:
        return
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise RunError(
            f"{path} needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free on that disk; make room there"
            f"{f', {remedy}' if remedy else ''}"
        )


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
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Bring the entries of a folder to the disk, so that a rename outlasts a power cut; Windows does it by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):  # some cannot sync folders
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Bring a file, if it is there, to the disk."""
    with suppress(FileNotFoundError), path.open("rb+") as file:
        os.fsync(file.fileno())


def set_aside(path: Path, copy: bool = False) -> Path:
    """Rename a damaged file or folder to ``NAME.damaged`` (or ``.damaged-2``, ...), so that it stays; return that.

    Args:
        copy: the file itself stays, too.
    """
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    if copy:
        shutil.copyfile(path, temp_path(target))
        _replace(temp_path(target), target)
    else:
        _replace(path, target)
    return target


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
            sync_file(file)
        elif file.is_dir():
            sync_folder(file)
    sync_folder(temp)
    delete(target)
    _replace(temp, target)
    return target


@contextmanager
def cached_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes ``target`` at the end, unless another process was faster."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """Append one JSON object a line: all of them or none. A last line that a kill has torn is dropped before."""
    text = "".join(dumps(row) + "\n" for row in rows)
    with path.open("ab+") as file:  # opened for each step: Windows cannot rename over an open file
        if (end := _whole_lines(file)) < file.seek(0, os.SEEK_END):
            file.truncate(end)
        try:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
        except OSError:
            with suppress(OSError):
                os.truncate(path, end)
            raise


def _whole_lines(file: Any, block: int = 1 << 16) -> int:
    """Return where the last whole line of an open file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - block)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return int(begin + newline + 1)
        end = begin
    return 0


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return ``(line, row)`` of every whole line; a torn last line is left out.

    Raises:
        UserError: a line before the last is not JSON, or the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    found = []
    # What follows the last newline was torn by a kill, even if it reads as JSON (a number may be cut).
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
