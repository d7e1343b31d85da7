"""What a path that a person writes means on this machine. No torch here."""

import os
import re
from pathlib import Path

_DRIVE = re.compile(r"([A-Za-z]):[\\/]+(.*)", re.DOTALL)
_SHARE = re.compile(r"[\\/]{2}wsl(?:\$|\.localhost)[\\/][^\\/]+[\\/](.*)", re.DOTALL | re.IGNORECASE)
_MOUNTS = Path("/mnt")  # where the Windows Subsystem for Linux puts the drives of Windows


def local_path(text: str) -> Path:
    r"""Return the path that a text means here; it need not exist.

    A name that is there as it is written is taken so. Otherwise ``~`` is the home folder, and on Linux and macOS a path
    of Windows is the one that it has inside the Windows Subsystem for Linux: ``C:\Users\me`` is ``/mnt/c/Users/me``.
    """
    path = Path(text)
    if os.path.lexists(path):
        return path
    if (translated := _from_windows(text)) is not None:
        return translated
    try:
        return path.expanduser()
    except RuntimeError:  # ~name, and nobody here has that name
        return path


def path_hint(text: str) -> str:
    """Return what to add to "is not there" for a path of Windows on another system; otherwise an empty text."""
    translated = _from_windows(text)
    if translated is None or translated.exists():
        return ""
    return f" (here a path of Windows is written {translated.as_posix()}, and that is not there either)"


def _from_windows(text: str) -> Path | None:
    if os.name == "nt":
        return None
    if found := _DRIVE.fullmatch(text):
        return _MOUNTS / found[1].lower() / found[2].replace("\\", "/")
    if found := _SHARE.fullmatch(text):
        return Path("/") / found[1].replace("\\", "/")
    if "\\" in text and not os.path.lexists(text):
        turned = Path(text.replace("\\", "/"))
        return turned if turned.exists() else None
    return None
