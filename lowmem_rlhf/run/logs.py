"""The logs of a run beside its checkpoints: what they held when one was saved, and the way back to it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lowmem_rlhf.files import atomic_write, set_aside
from lowmem_rlhf.progress import message


class LogProof:
    """The running hash of a log that only grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash, self._bytes = hashlib.sha256(), 0

    def values(self) -> dict[str, Any]:
        """Return ``bytes`` and ``sha256`` of what the log holds now."""
        if self._path.is_file():
            if self._path.stat().st_size < self._bytes:  # it was taken back
                self._hash, self._bytes = hashlib.sha256(), 0
            with self._path.open("rb") as file:
                file.seek(self._bytes)
                while block := file.read(1 << 20):
                    self._hash.update(block)
                    self._bytes += len(block)
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def rewind_log(path: Path, shown: Path, step: int, proof: Any, row_a_step: bool) -> None:
    """Take a log back to what it held after a step; say what it lacks or what in it was changed, and never stop at it.

    Args:
        path: the log, which need not be there.
        shown: its path as the user is to read it.
        step: whose rows and all before stay.
        proof: of `LogProof.values` when the step was saved; None where there is none.
        row_a_step: it has one row for each step.
    """
    data = path.read_bytes() if path.exists() else b""
    size = proof.get("bytes") if isinstance(proof, dict) else None
    if isinstance(size, int) and hashlib.sha256(data[:size]).hexdigest() == proof.get("sha256"):
        if len(data) > size:
            atomic_write(path, data[:size])
        return
    kept, unreadable = _rows_until(data, step)
    lost = row_a_step and len(kept) < step
    if (proof is not None and (data or size)) or unreadable or lost:
        rows = f"{len(kept)} rows of {step} steps" if row_a_step else f"{len(kept)} rows"
        aside = ""
        if data and (unreadable or proof is not None):
            aside = f"; as it was found it is {set_aside(path, copy=True).name}"
        message(
            f"{shown} is not what was written up to step {step} (damaged, edited or cut): the run goes on, and the "
            f"{rows} that can be read stay{aside}"
        )
    if path.exists():
        atomic_write(path, b"".join(kept))


def _rows_until(data: bytes, step: int) -> tuple[list[bytes], int]:
    """Return the lines up to a step, and how many others before the torn last one cannot be read."""
    *lines, _ = data.split(b"\n")
    kept, unreadable = [], 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            of = row.get("step", 0)
            if of <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, AttributeError, RecursionError):
            unreadable += number < len(lines)
    return kept, unreadable
