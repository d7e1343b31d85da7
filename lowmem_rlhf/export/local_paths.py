"""Paths without the folders of this machine, for files that leave it. No torch here."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

PATH_KEYS = (
    "model",
    "adapter",
    "algorithm",
    "train",
    "eval",
    "file",
    "function",
    "loss_type",
)  # of a recipe, whose values may be paths


def without_folders(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a recipe's values with local paths cut to their last part, and the whole paths by dotted key.

    Relative paths tell nothing about the machine and stay.
    """
    local: dict[str, str] = {}

    def cleaned(value: Any, key: str, may_be_path: bool) -> Any:
        if isinstance(value, dict):
            inside = may_be_path and key.endswith("options")
            dot = f"{key}." if key else ""
            return {
                k: cleaned(v, f"{dot}{k}", inside or k in (*PATH_KEYS, "rewards", "options")) for k, v in value.items()
            }
        if isinstance(value, list):
            return [cleaned(v, f"{key}[{i}]", may_be_path) for i, v in enumerate(value)]
        if isinstance(value, str) and may_be_path and has_folder(value):
            local[key] = value
            return last_part(value)
        return value

    return {key: cleaned(value, key, key in (*PATH_KEYS, "data", "rewards")) for key, value in values.items()}, local


def has_folder(text: str) -> bool:
    """Whether a text is a path that begins in a folder of this machine."""
    absolute = PurePosixPath(text).is_absolute() or bool(PureWindowsPath(text).drive)
    return absolute or text.startswith(("~", "..", "\\\\"))


def last_part(path: str) -> str:
    """Return a path's last part."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
