"""What lies in a run directory, and how it is read. No torch here."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lowmem_rlhf.algorithms.registry import is_own, load_own
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import read_lines
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.checkpoints import is_healthy, step_of
from lowmem_rlhf.run.held_out import BEST, part, with_evaluations
from lowmem_rlhf.run.trust import check_code

RECIPE, PLAN, METRICS, SAMPLES = "recipe.yaml", "plan.json", "metrics.jsonl", "samples.jsonl"
EVALUATION, REPORT, CHECKPOINTS, ADAPTER = "evaluation.json", "report.html", "checkpoints", "adapter"
INPUTS = "inputs.json"
MODEL = "model"  # of a classifier's run, in place of the adapter


class RunReader:
    """The files of one run. Nothing is checked before it is asked for, and nothing is written."""

    def __init__(self, path: Path) -> None:
        """Wrap a folder."""
        self._given, self._absolute = Path(path), Path(os.path.abspath(path))

    @property
    def path(self) -> Path:
        """The folder: as it was given, or from the root where the current folder is another one by now."""
        with suppress(OSError):  # the current folder may be gone
            if Path(os.path.abspath(self._given)) == self._absolute:
                return self._given
        return self._absolute

    def holds_run(self) -> bool:
        """Whether a run has begun there."""
        return any((self.path / name).exists() for name in (RECIPE, METRICS, CHECKPOINTS))

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return the finished checkpoints, oldest first."""
        folder = self.path / CHECKPOINTS
        folders = [] if not folder.is_dir() else [p for p in folder.iterdir() if p.is_dir()]
        return sorted((step, p) for p in folders if (step := step_of(p)) is not None)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Return ``(step, folder)`` of the latest finished checkpoint."""
        checkpoints = self.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def last_healthy(self, before: int | None = None) -> tuple[int, Path] | None:
        """Return ``(step, folder)`` of the latest checkpoint that was saved while training was in order.

        Args:
            before: the step from which on it was not, where that was seen some steps later.
        """
        earlier = [one for one in self.checkpoints() if before is None or one[0] < before]
        return next((one for one in reversed(earlier) if is_healthy(one[1])), None)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics, one row a step; of one that was evaluated with what that measured, as ``eval/NAME``.

        The log is written when a step ends and its evaluation when that ends, so that neither waits for the other.
        """
        evaluation: dict[str, Any] = {}
        with suppress(UserError):  # damaged, which is said where it is read for itself
            evaluation = self.evaluation()
        return with_evaluations((row for _, row in read_lines(self.path / METRICS)), evaluation)

    def samples(self) -> list[dict[str, Any]]:
        """Return the logged samples, oldest first."""
        return [row for _, row in read_lines(self.path / SAMPLES)]

    def evaluation(self) -> dict[str, Any]:
        """Return the held-out results; empty when there are none yet."""
        return self._json(EVALUATION)

    def best_step(self) -> int | None:
        """Return the step of the best evaluation, whose checkpoint is kept; None where none is."""
        with suppress(UserError):
            step = part(self.evaluation(), BEST).get("step")
            return step if isinstance(step, int) else None
        return None

    def plan(self) -> dict[str, Any]:
        """Return the plan; empty when there is none."""
        return self._json(PLAN)

    def inputs(self) -> dict[str, Any]:
        """Return what is known of the data and the base; empty of a run that kept none."""
        return {key: value for key, value in self._json(INPUTS).items() if isinstance(value, dict)}

    def recipe(self) -> Recipe:
        """Return the resolved recipe, with its paths as they were written.

        Raises:
            UserError: there is no readable recipe.yaml, it is not one of this version, or its algorithm is code of
                elsewhere (see `run.trust`).
        """
        values = self.recipe_values()
        if is_own(algorithm := str(values.get("algorithm"))):
            check_code(self.path, {"algorithm": algorithm})
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
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
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
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not JSON: {error}") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{file} is not a JSON object")
        return value
