"""What a path that a person writes means on this machine. No torch here."""

import errno
import os
import re
import stat
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


def obstacle(path: str | Path) -> str:
    """Return what keeps a path from being a file or a folder that can be read; empty where nothing is in the way.

    A path that is simply not there has no obstacle.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        return "holds a character that no path can have"
    except OSError as error:
        if os.path.islink(path):
            return "is a link that leads nowhere"
        known = {errno.ENAMETOOLONG: "is too long for a path", errno.EACCES: "may not be looked at by this user"}
        return known.get(error.errno or 0, "")
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    return "is a device, a pipe or a socket, not a file"


def cannot_be_written(path: Path) -> str:
    """Return what keeps a new file or folder of this path from being made; empty where nothing is known to."""
    if why := obstacle(path):
        return f"{path} {why}"
    if path.is_dir():
        return "" if os.access(path, os.W_OK | os.X_OK) else f"the folder {path} may not be written"
    above = next((one for one in path.absolute().parents if os.path.lexists(one)), None)
    if above is None or not above.is_dir():
        return f"{above} is not a folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"the folder {above} may not be written"
    if above.as_posix().startswith(("/proc/", "/sys/")) or above.as_posix() in ("/proc", "/sys"):
        return f"{above} holds no files of users"
    return ""


def without_home(text: str) -> str:
    """Return a text with this user's home folder, where a path in it begins so, written as ``~``."""
    try:
        home = str(Path.home())
    except RuntimeError:  # this user has none
        return text
    if len(home) < 2:
        return text
    return re.sub(rf"(?<![\w./\\-]){re.escape(home)}(?![\w.-])", "~", text)


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
