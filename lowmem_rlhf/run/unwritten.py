"""The run directory in the processes that do not write it: one of several does, and the others read it."""

from collections.abc import Iterable
from typing import Any

from lowmem_rlhf.run.directory import RunDirectory


class UnwrittenRun(RunDirectory):
    """A run that another process writes; what would be written is left out.

    Whoever makes checkpoints or the adapter asks `writes` before.
    """

    writes = False

    def lock(self) -> None:
        """Do nothing: the process that writes holds the lock."""

    def unlock(self) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Do nothing."""

    def log_samples(self, step: int, samples: Iterable[dict[str, Any]]) -> None:
        """Do nothing."""

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Do nothing."""

    def change_settings(self, settings: dict[str, Any], reason: str) -> None:
        """Do nothing: plan.json has the settings of the process that writes."""

    def rewind(self, step: int) -> None:
        """Do nothing."""
