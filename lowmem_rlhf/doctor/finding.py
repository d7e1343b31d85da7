"""What a check says."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "error"]
WORST: tuple[Status, ...] = ("ok", "warning", "error")  # the worst last


@dataclass(frozen=True)
class Finding:
    """One finding of a check.

    Attributes:
        check: the check's name.
        status: ``ok``; ``warning``: runs go on, with less than they could have; ``error``: something will fail.
        found: what was found.
        means: what that means for a run; empty where nothing follows.
        command: what mends it, as it is typed in a shell; None where no command does.
    """

    check: str
    status: Status
    found: str
    means: str = ""
    command: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return asdict(self)


def worst(findings: list[Finding]) -> Status:
    """Return the worst status of all; ``ok`` without findings."""
    return max((one.status for one in findings), key=WORST.index, default="ok")
