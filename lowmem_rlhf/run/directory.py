"""The run directory: everything a run leaves on disk, and the rules for starting, resuming and reading one.

Files appear whole or not at all (see :mod:`lowmem_rlhf.files`), so a run that is killed at any moment can be read and
resumed. ``metrics.jsonl`` and ``samples.jsonl`` grow by appended lines; a line torn by a kill is ignored by readers and
dropped by a resume. No torch here.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lowmem_rlhf.algorithms.registry import is_own, load_own
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import (
    append_lines,
    atomic_write,
    begin_folder,
    delete,
    dumps,
    finish_folder,
    is_temp,
    read_lines,
    temp_path,
)
from lowmem_rlhf.recipe.field_roles import keys_with
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.base_file import write_base
from lowmem_rlhf.run.start import write_start

RECIPE, PLAN, METRICS, SAMPLES = "recipe.yaml", "plan.json", "metrics.jsonl", "samples.jsonl"
EVALUATION, REPORT, CHECKPOINTS, ADAPTER = "evaluation.json", "report.html", "checkpoints", "adapter"
INPUTS = "inputs.json"
MODEL = "model"  # of a classifier's run, in place of the adapter

# What a resume may change: how long, how often and where, never what is learned.
MAY_CHANGE = keys_with(Recipe, may_change_on_resume=True)
_DESKTOP_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}


class RunDirectory:
    """One run on disk. Make one with :meth:`create`, read one with :func:`open_run`."""

    def __init__(self, path: Path, save_total_limit: int | None = None) -> None:
        """Wrap a folder; nothing is checked or written. Without ``save_total_limit`` every checkpoint is kept."""
        self.path = Path(path)
        self.save_total_limit = save_total_limit

    @classmethod
    def create(
        cls,
        path: str | Path,
        recipe: Recipe,
        plan_dict: dict[str, Any],
        resume: bool,
        inputs: dict[str, Any] | None = None,
    ) -> "RunDirectory":
        """Start a run in a new or empty folder, or continue the one that is there.

        A resume takes the logs back to the latest checkpoint (see :meth:`rewind`), without one to the start.

        Args:
            path: the folder.
            recipe: with its paths as they were written, relative to the current folder or to the one of the start.
            plan_dict: what plan.json holds.
            resume: continue.
            inputs: what inputs.json holds (see `data.provenance`); None: what is there stays.

        Raises:
            UserError: the folder holds another run or foreign files, is a file or cannot be written; with ``resume``,
                there is no run, or the recipe differs in what is learned. Nothing was changed then.
        """
        run = cls(Path(path), recipe.training.save_total_limit)
        try:
            cls.check(run.path, recipe, resume)
            if resume:
                start = run._last_step()
                run.rewind(start)
                evaluation = run.evaluation()
                if start < recipe.training.max_steps and evaluation.pop("after", None) is not None:
                    run.write_evaluation(evaluation)
            run.path.mkdir(parents=True, exist_ok=True)
            run._clean()
            atomic_write(run.path / RECIPE, recipe.to_yaml())
            atomic_write(run.path / PLAN, dumps(plan_dict, indent=2) + "\n")
            write_start(run.path, recipe)
            if inputs is not None:
                atomic_write(run.path / INPUTS, dumps(inputs, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"output folder {path} cannot be written ({error.strerror or error}); choose another one with --output"
            ) from error
        return run

    @classmethod
    def check(cls, path: str | Path, recipe: Recipe, resume: bool) -> None:
        """Check that a run may start (or continue) there, before anything costly; writes nothing.

        Raises:
            UserError: as for `create`.
        """
        run = cls(Path(path))
        run._check_resume(recipe) if resume else run._check_new()

    def _last_step(self) -> int:
        latest = self.latest_checkpoint()
        return latest[0] if latest else 0

    def _check_new(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"output {self.path} is a file, not a folder; choose another one with --output")
        if self._holds_run():
            raise UserError(
                f"output folder {self.path} already holds a run; continue it with --resume, or choose another folder "
                "with --output"
            )
        foreign = sorted(p.name for p in self.path.iterdir() if not is_temp(p) and p.name not in _DESKTOP_FILES)
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UserError(
                f"output folder {self.path} is not empty and holds no run ({shown}); choose another one with --output"
            )

    def _check_resume(self, recipe: Recipe) -> None:
        if not self._holds_run():
            raise UserError(
                f"--resume: there is no run in {self.path}; name the run's folder with --output, or start one "
                "without --resume"
            )
        saved = _flatten(self.recipe().model_dump())
        wanted = _flatten(recipe.model_dump())
        lines = [
            f"  {key}: was {saved.get(key, 'absent')!r}, is now {wanted.get(key, 'absent')!r}"
            for key in dict.fromkeys([*saved, *wanted])
            if saved.get(key) != wanted.get(key) and not _may_change(key)
        ]
        if lines:
            head = f"--resume: the recipe differs from the one that the run in {self.path} began with:"
            whole = [key for key in MAY_CHANGE if key.endswith(".*")]
            single = [key for key in MAY_CHANGE if key not in whole]
            tail = (
                "Undo these changes, or start a new run with another --output (a resume may change "
                f"{', '.join(single)} and {', '.join(whole)})."
            )
            raise UserError("\n".join([head, *lines, tail]))

    def _holds_run(self) -> bool:
        return any((self.path / name).exists() for name in (RECIPE, METRICS, CHECKPOINTS))

    def _clean(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.path, self.path / CHECKPOINTS):
            if folder.is_dir():
                for path in [p for p in folder.iterdir() if is_temp(p)]:
                    delete(path)

    # Writing

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one step's metrics (with its ``step``); numbers that are not finite become null."""
        append_lines(self.path / METRICS, [{"step": metrics["step"], **metrics}])

    def log_samples(self, step: int, samples: Iterable[dict[str, Any]]) -> None:
        """Append a step's samples: ``prompt`` (text or chat messages), ``completion``, ``rewards`` by name, ..."""
        append_lines(self.path / SAMPLES, [{"step": step, **sample} for sample in samples])

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Write the held-out results, ``{"before": {...}, "after": {...}}``; ``after`` may still be missing."""
        atomic_write(self.path / EVALUATION, dumps(evaluation, indent=2) + "\n")

    def change_settings(self, settings: dict[str, Any], reason: str) -> None:
        """Write settings that changed while the run goes on into plan.json, with the reason."""
        plan = self.plan()
        if not plan:
            return
        plan["settings"] = {**plan.get("settings", {}), **settings}
        plan["reasons"] = {**plan.get("reasons", {}), **dict.fromkeys(settings, reason)}
        atomic_write(self.path / PLAN, dumps(plan, indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Go back to ``step``: drop later lines and torn ones from the logs, and later checkpoints."""
        for name in (METRICS, SAMPLES):
            file = self.path / name
            if file.exists():
                earlier = [line + b"\n" for line, row in read_lines(file) if row.get("step", 0) <= step]
                atomic_write(file, b"".join(earlier))
        for later, folder in self.checkpoints():
            if later > step:
                delete(folder)

    def begin_checkpoint(self, step: int) -> Path:
        """Return an empty temporary folder to save step ``step`` into; call :meth:`finish_checkpoint` after it."""
        return begin_folder(self.path / CHECKPOINTS / f"step-{step}")

    def finish_checkpoint(self, step: int) -> Path:
        """Make the checkpoint appear as ``checkpoints/step-N`` and delete the oldest beyond ``save_total_limit``."""
        target = self.path / CHECKPOINTS / f"step-{step}"
        write_base(temp_path(target), self.inputs().get("base"))
        folder = finish_folder(target)
        if self.save_total_limit is not None:
            for _, old in self.checkpoints()[: -self.save_total_limit]:
                delete(old)
        return folder

    @contextmanager
    def new_adapter(self) -> Iterator[Path]:
        """Yield a temporary folder that becomes ``adapter/`` when the block ends without an error."""
        target = self.path / ADAPTER
        folder = begin_folder(target)
        yield folder
        write_base(folder, self.inputs().get("base"))
        finish_folder(target)

    # Reading

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return the finished checkpoints, oldest first."""
        folder = self.path / CHECKPOINTS
        folders = [] if not folder.is_dir() else [p for p in folder.iterdir() if p.is_dir()]
        return sorted((int(m[1]), p) for p in folders if (m := re.fullmatch(r"step-(\d+)", p.name)))

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Return ``(step, folder)`` of the latest finished checkpoint."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics, one row a step."""
        return [row for _, row in read_lines(self.path / METRICS)]

    def samples(self) -> list[dict[str, Any]]:
        """Return the logged samples, oldest first."""
        return [row for _, row in read_lines(self.path / SAMPLES)]

    def evaluation(self) -> dict[str, Any]:
        """Return the held-out results; empty when there are none yet."""
        return self._json(EVALUATION)

    def plan(self) -> dict[str, Any]:
        """Return the plan; empty when there is none."""
        return self._json(PLAN)

    def inputs(self) -> dict[str, Any]:
        """Return what is known of the data and the base; empty of a run that kept none."""
        return {key: value for key, value in self._json(INPUTS).items() if isinstance(value, dict)}

    def recipe(self) -> Recipe:
        """Return the resolved recipe, with its paths as they were written.

        Raises:
            UserError: there is no readable recipe.yaml, or it is not one of this version.
        """
        values = self.recipe_values()
        if is_own(algorithm := str(values.get("algorithm"))):
            load_own(algorithm, self.path)
        return validate_recipe(values, source=str(self.path / RECIPE))

    def recipe_values(self) -> dict[str, Any]:
        """Return the resolved recipe as plain values.

        Raises:
            UserError: there is no readable recipe.yaml.
        """
        file = self.path / RECIPE
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise UserError(f"{file} is not a mapping of keys to values")
        return values

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.exists():
            return {}
        try:
            value = json.loads(file.read_bytes())
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{file} is not a JSON object")
        return value


def open_run(path: str | Path) -> RunDirectory:
    """Open a run for reading.

    Raises:
        UserError: there is no run in that folder.
    """
    folder = Path(path)
    if (folder / RECIPE).is_file():
        return RunDirectory(folder)
    problem = "does not exist" if not folder.exists() else f"is no run: it holds no {RECIPE}"
    inside = next((f"; did you mean {p}?" for p in list(folder.parents)[:2] if (p / RECIPE).is_file()), "")
    raise UserError(f"{path} {problem}; give the folder that `train` wrote, for example runs/NAME{inside}")


def default_output(name: str, resume: bool = False) -> Path:
    """Return the first free of ``runs/NAME``, ``runs/NAME-2``, ...; with ``resume`` the last that is taken.

    Characters that a folder name cannot have on every system are replaced by a dash.
    """
    base = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"
    candidate, last, number = Path("runs") / base, Path("runs") / base, 1
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number, last = number + 1, candidate
        candidate = Path("runs") / f"{base}-{number}"
    return last if resume else candidate


def _may_change(key: str) -> bool:
    """Whether a resume may change the key of a flattened recipe."""
    names = {re.sub(r"\[\d+\]", "[]", key), f"{key.partition('.')[0]}.*"}
    return bool(names.intersection(MAY_CHANGE))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted keys as overrides write them, for example ``rewards[0].weight``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                flat |= _flatten(item, f"{prefix}{key}[{index}].")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
