"""Where the shipped recipes, profiles and files lie: inside the installed package, or at the top of a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(kind: str) -> Path:
    """Return the folder of the shipped ``kind`` (``"recipes"`` or ``"profiles"``).

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_shipped" / kind, _PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the {kind} that ship with lowmem_rlhf are missing from this installation; reinstall it")


def shipped_file(name: str) -> Path:
    """Return a shipped file of the top folder (``"constraints.txt"``).

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for folder in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name}, which ships with lowmem_rlhf, is missing from this installation; reinstall it")
