"""The checkout that the package runs from, if it does, and its commit."""

import subprocess
from contextlib import suppress
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2]


def checkout() -> Path | None:
    """Return the folder of the checkout that this package lies in; None where it is installed from a wheel."""
    there = (FOLDER / ".git").exists() and (FOLDER / "pyproject.toml").is_file() and (FOLDER / "tests").is_dir()
    return FOLDER if there else None


def commit() -> str | None:
    """Return the checkout's commit, short, with ``+changes`` where tracked files differ from it; None without one."""
    folder = checkout()
    if folder is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        head = _git(folder, "rev-parse", "--short", "HEAD")
        return f"{head}+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else head
    return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()
