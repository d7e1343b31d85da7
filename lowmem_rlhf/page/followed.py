"""Which runs the page shows: those that were named, and whatever there is below a folder, new ones too."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.page.lines import Missing
from lowmem_rlhf.page.source import RunSource, shown
from lowmem_rlhf.paths import obstacle
from lowmem_rlhf.progress import message
from lowmem_rlhf.run.listing import RUNS, latest_run
from lowmem_rlhf.run.reading import RunReader


class Followed:
    """The runs that are watched, each under an id that is made of its path.

    Args:
        runs: that stay listed, also once they are gone.
        folders: whose runs are listed while they are there.
    """

    def __init__(self, runs: Sequence[Path], folders: Sequence[Path]) -> None:
        self._runs, self._folders = [Path(os.path.abspath(path)) for path in runs], list(folders)
        self._sources: dict[str, RunSource] = {}
        self._lock = Lock()

    @classmethod
    def named(cls, names: Sequence[str]) -> "Followed":
        """Return the runs that are meant: by a run's folder, a folder of runs, or a recipe's name for its newest run.

        Args:
            names: none for those in ``runs``.

        Raises:
            UserError: there is no such folder and no such run.
        """
        if not names:
            return cls([], [RUNS])
        found = [_found(name) for name in names]
        return cls([path for path, is_run in found if is_run], [path for path, is_run in found if not is_run])

    def all(self) -> dict[str, RunSource]:
        """Return the runs by id; those of folders are looked for anew."""
        paths = dict.fromkeys([*self._runs, *(run for folder in self._folders for run in _runs_below(folder))])
        with self._lock:
            by_id = {_id(path): path for path in paths}
            self._sources = {key: self._sources.get(key) or RunSource(path) for key, path in by_id.items()}
            return dict(self._sources)

    def source(self, key: str) -> RunSource:
        """Return the run of an id.

        Raises:
            Missing: there is none.
        """
        with self._lock:
            source = self._sources.get(key)
        if (source := source or self.all().get(key)) is None:
            raise Missing("there is no run of this id; GET /api/runs lists those that there are")
        return source

    def list(self) -> list[dict[str, Any]]:
        """Return what `RunSource.summary` tells of each run, with its ``id``; the newest first.

        One that was named and is gone has the state ``gone`` and an ``error``.
        """
        told = [{"id": key, **_summary(source)} for key, source in self.all().items()]
        return sorted(told, key=lambda run: run.get("changed") or 0.0, reverse=True)


def _summary(source: RunSource) -> dict[str, Any]:
    try:
        return source.summary()
    except (UserError, OSError) as error:
        path = str(source.path)
        return shown({"name": source.path.name, "path": path, "state": "gone", "error": str(error)})


def _id(path: Path) -> str:
    return hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest()


def _found(name: str) -> tuple[Path, bool]:
    """Return the path that a name means, and whether it is one run."""
    if not name:
        raise UserError("a run's name is empty; give the folder of a run or of runs, or none for those in runs")
    if why := obstacle(name):
        raise UserError(f"{name} {why}; give the folder of a run, or a folder of runs")
    path = Path(name)
    if RunReader(path).holds_run():
        return path, True
    if path.is_dir():
        return path, False
    if len(path.parts) == 1 and not path.exists() and (newest := latest_run(path.name)):
        message(f"{name} is {newest}, its newest run")
        return newest, True
    raise UserError(
        f"{name} {'is a file' if path.exists() else 'does not exist'}; give the folder of a run, a folder of runs, or "
        "a recipe's name for its newest run (`lowmem-rlhf runs` lists them)"
    )


def _runs_below(folder: Path) -> list[Path]:
    try:
        there = sorted(Path(os.path.abspath(folder)).iterdir())
        return [path for path in there if path.is_dir() and RunReader(path).holds_run()]
    except OSError:
        return []
