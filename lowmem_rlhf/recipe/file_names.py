"""Names and paths of a recipe within what file systems take. Loads without torch."""

import re

MOST_NAME = 200  # bytes; file systems take 255, and endings and numbers are put behind a name
MOST_PART = 255  # bytes of one part of a path
MOST_PATH = 4000  # bytes; Linux takes 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # of Windows, which makes no such files


def check_path(text: str) -> str:
    """Return a path, or what may be one.

    Raises:
        ValueError: no file system takes it.
    """
    if match := _CONTROL.search(text):
        raise ValueError(f"holds the control character U+{ord(match[0]):04X}; take it out")
    parts = re.split(r"[/\\]", text)
    longest = max(_size(part) for part in parts)
    if _size(text) > MOST_PATH or longest > MOST_PART:
        raise ValueError(
            f"got a path of {_size(text)} bytes whose longest part has {longest}; a path has at most {MOST_PATH}, "
            f"and a part of it at most {MOST_PART}"
        )
    return text


def check_name(text: str) -> str:
    """Return a name that is shown and written.

    Raises:
        ValueError: it is too long or holds a control character.
    """
    if match := _CONTROL.search(text):
        raise ValueError(f"holds the control character U+{ord(match[0]):04X}; take it out")
    if _size(text) > MOST_NAME:
        raise ValueError(f"got a name of {_size(text)} bytes; it should have at most {MOST_NAME}")
    return text


def check_folder_name(text: str) -> str:
    """Return the name of a recipe, after which its run's folder is called.

    Raises:
        ValueError: no folder can be called so on every system.
    """
    if _DEVICES.fullmatch(check_name(text).strip()):
        raise ValueError(f"got {text!r}, which Windows keeps for a device; take another name")
    return text


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
