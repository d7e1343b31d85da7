"""What is on the disk of a checkpoint or an adapter: read only if it is what was written. No torch here.

``state.json`` is written last. It holds ``format``, ``step``, ``healthy`` (training was in order then), ``files``
(see `run.proof`), ``logs`` (what the logs held by then), and what training adds: ``optimizer`` and ``counters``.
Checkpoints of before that have no ``format`` and no hashes; of them only the form is checked.
"""

import json
import re
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.proof import FORMAT, HASHES, Damaged, check_files, hash_files, read_sealed, seal

STATE = "state.json"


def write_state(folder: Path, step: int, healthy: bool, logs: dict[str, Any], values: dict[str, Any]) -> None:
    """Write state.json, the last file of a checkpoint: it proves the others."""
    head = {"format": FORMAT, "step": step, "healthy": healthy, "files": hash_files(folder, STATE), "logs": logs}
    (folder / STATE).write_text(seal({**values, **head}), encoding="utf-8")


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint that is whole, and the one that its folder is named after.

    Raises:
        Damaged: a file is not what was written.
        UserError: a file may not be read, or a newer version wrote it.
    """
    state, proven = read_sealed(folder / STATE)
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise Damaged(f"{STATE} names no step")
    if (named := step_of(folder)) is not None and named != step:
        raise Damaged(f"{STATE} is of step {step}")
    if proven:
        check_files(folder, STATE, state.get("files"))
        return state
    for key in ("optimizer", "counters"):
        if not isinstance(state.get(key), dict):
            raise Damaged(f"{STATE} holds no {key}")
    for path in sorted({folder / "optimizer.safetensors", *folder.rglob("*.safetensors")}):
        _check_safetensors(path)
    return state


def is_healthy(folder: Path) -> bool:
    """Whether a checkpoint's state.json can be read and says that training was in order."""
    try:
        return read_sealed(folder / STATE)[0].get("healthy", True) is not False
    except (Damaged, UserError):
        return False


def step_of(folder: Path) -> int | None:
    """Return the step that a checkpoint's folder is named after, ``step-N``; None of another name."""
    found = re.fullmatch(r"step-(\d{1,18})", folder.name)
    return int(found[1]) if found else None


def check_adapter(folder: Path, remedy: str) -> None:
    """Check that an adapter that is about to be read (finished, or of a checkpoint) is what was written.

    Args:
        folder: with the adapter's files; one without any hashes is taken as it is.
        remedy: what to do, the end of the sentence.

    Raises:
        UserError: a file differs.
    """
    try:
        if (folder / STATE).is_file():
            read_checkpoint(folder)
        elif (folder / HASHES).is_file():
            values, _ = read_sealed(folder / HASHES)
            check_files(folder, HASHES, values.get("files"))
    except Damaged as damage:
        raise UserError(f"{folder} is damaged: {damage}; {remedy}") from damage


def _check_safetensors(path: Path) -> None:
    """Check that a file has the length that its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("it is cut off")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if size != 8 + length + max(ends, default=0):
            raise ValueError("it is cut off, or longer than its header says")
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise Damaged(f"{path.name} is not a whole safetensors file ({error})") from error
