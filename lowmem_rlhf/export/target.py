"""The folder that an export goes to, and the room on its disk. No torch here."""

import shutil
from pathlib import Path

from lowmem_rlhf.display.format import format_bytes
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.files import is_temp
from lowmem_rlhf.paths import cannot_be_written, obstacle

EXPORT = "export.json"


def check_target(target: Path) -> None:
    """Check that an export may be written there: only an older export is replaced.

    Raises:
        UserError: something else is there.
    """
    if obstacle(target) == "" and target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file, not a folder; choose another one with --output")
    if why := cannot_be_written(target):
        raise UserError(f"output: {why}; choose another folder with --output")
    if target.is_dir() and not (target / EXPORT).is_file():
        foreign = sorted(path.name for path in target.iterdir() if not is_temp(path))
        if foreign:
            raise UserError(
                f"output folder {target} is not empty and holds no export ({', '.join(foreign[:3])}); choose another "
                "one with --output"
            )


def free_disk(target: Path) -> int:
    """Return the free bytes on the disk where a folder is to appear."""
    nearest = next(path for path in (target, *target.absolute().parents) if path.exists())
    return shutil.disk_usage(nearest).free


def check_disk(needed: int, target: Path) -> None:
    """Check that an export fits on the disk, beside an older one until that is replaced.

    Raises:
        RunError: it does not.
    """
    free = free_disk(target)
    if needed > free:
        raise RunError(
            f"the export needs {format_bytes(needed)} ({needed:,} bytes) on the disk of {target} and "
            f"{format_bytes(free)} ({free:,} bytes) are free; make room, or choose a folder on another disk with "
            "--output"
        )
