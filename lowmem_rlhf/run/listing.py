"""The runs below a folder: how far each is and what came of it, and which of them a name means. No torch here."""

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.held_out import AFTER, BEFORE, STOPPED, headline, number, part
from lowmem_rlhf.run.lock import LOCK, Lock
from lowmem_rlhf.run.reading import ADAPTER, METRICS, MODEL, RECIPE, RunReader

RUNS = Path("runs")
State = Literal["running", "finished", "stopped"]


@dataclass(frozen=True)
class RunSummary:
    """A run in a few values.

    Attributes:
        path: its folder.
        name, algorithm: of its recipe.
        state: ``stopped`` is any end before the last step; ``train --resume`` goes on from there.
        steps, max_steps: taken, and in all.
        seconds: that these steps took.
        headline: the measure that the task has, of held-out data; None where nothing was measured.
        before, after: its values.
        changed: when something was last logged, in seconds since 1970.
    """

    path: str
    name: str
    algorithm: str
    state: State
    steps: int
    max_steps: int | None
    seconds: float
    headline: str | None
    before: float | None
    after: float | None
    changed: float

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return asdict(self)


def runs_in(folder: Path = RUNS) -> list[RunSummary]:
    """Return the runs that lie in a folder, the newest last; those that cannot be read are left out.

    Raises:
        UserError: it is a file, or may not be read.
    """
    found = [run for path in _folders(folder) if (run := _readable(path)) is not None]
    return sorted(found, key=lambda run: (run.changed, run.path))


def newest_run(name: str) -> Path | None:
    """Return the folder of the newest finished run of a recipe in `RUNS`; None where there is no run of it at all.

    Args:
        name: of the recipe, or as folders have it (see `base_name`).

    Raises:
        UserError: it has runs, and none is finished; or `RUNS` may not be read.
    """
    own = [run for path in _folders(RUNS) if _is_of(path, name) and (run := _readable(path)) is not None]
    if not own:
        return None
    finished = [run for run in own if run.state == "finished"]
    if not finished:
        last = max(own, key=lambda run: run.changed)
        raise UserError(
            f"{name}: none of its runs is finished; {last.path} is {last.state} after {last.steps} of "
            f"{last.max_steps or '?'} steps; give that folder, or see `lowmem-rlhf runs`"
        )
    return Path(max(finished, key=lambda run: (run.changed, run.path)).path)


def latest_run(name: str) -> Path | None:
    """Return the folder of the newest run of a recipe in `RUNS`, finished or not; None where there is none.

    Args:
        name: as of `newest_run`.

    Raises:
        UserError: `RUNS` may not be read.
    """
    own = [run for path in _folders(RUNS) if _is_of(path, name) and (run := _readable(path)) is not None]
    return Path(max(own, key=lambda run: (run.changed, run.path)).path) if own else None


def base_name(name: str) -> str:
    """Return a recipe's name as that of a folder: what not every system allows is replaced by a dash."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"


def _folders(folder: Path) -> list[Path]:
    """Return what lies in a folder, if that is there."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be looked at: {error.strerror or error}; give a folder of runs") from error


def _is_of(path: Path, name: str) -> bool:
    with suppress(UserError):
        own = str(RunReader(path).recipe_values().get("name", ""))
        return name in (own, base_name(own))
    return False


def _readable(path: Path) -> RunSummary | None:
    with suppress(UserError, OSError):
        return _summary(path)
    return None


def _rows(log: Path) -> list[dict[str, Any]]:
    """Return what can be read of a log; one that is damaged is said where all of it is needed."""
    rows = []
    for line in log.read_bytes().split(b"\n")[:-1] if log.is_file() else []:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _summary(path: Path) -> RunSummary:
    run = RunReader(path)
    values = run.recipe_values()
    training = values.get("training")
    most = int(number(training.get("max_steps")) or 0) if isinstance(training, dict) else 0
    rows = _rows(path / METRICS)
    steps = int(number(rows[-1].get("step")) or 0) if rows else 0
    evaluation: dict[str, Any] = {}
    with suppress(UserError):
        evaluation = run.evaluation()
    measure = headline(evaluation) if evaluation else None
    values_of = [None if measure is None else number(part(evaluation, when).get(measure)) for when in (BEFORE, AFTER)]
    file = path / METRICS if (path / METRICS).is_file() else path / RECIPE
    return RunSummary(
        path=str(path),
        name=str(values.get("name", "")),
        algorithm=str(values.get("algorithm", "")),
        state=state_of(path, steps >= most or isinstance(evaluation.get(STOPPED), str)),
        steps=steps,
        max_steps=most or None,
        seconds=sum(number(row.get("time/step")) or 0.0 for row in rows),
        headline=measure,
        before=values_of[0],
        after=values_of[1],
        changed=file.stat().st_mtime,
    )


def state_of(path: Path, at_its_end: bool) -> State:
    """Return how a run stands.

    Args:
        at_its_end: it has taken all its steps, or was ended early by its evaluations.
    """
    try:
        Lock(path / LOCK, str(path)).check()
    except UserError:
        return "running"
    return "finished" if at_its_end and any((path / left).is_dir() for left in (ADAPTER, MODEL)) else "stopped"
