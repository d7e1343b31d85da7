"""The trackers that a recipe reports to, each by accelerate's class for it.

What they show is this run: the resolved recipe as its configuration, metrics at their steps, held-out results as
``eval/NAME`` at the step they were measured after. A resumed run goes on in the tracker's same run. A tracker that
fails is told nothing more; the others and the run go on. Nothing is sent anywhere unless the user's own tracker is set
up so (see `_wandb`).
"""

import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from netrc import NetrcParseError, netrc
from typing import Any
from urllib.parse import urlparse

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from lowmem_rlhf.errors import one_line
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.secrets import masked_values
from lowmem_rlhf.recipe.yaml_tree import write_yaml
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import number
from lowmem_rlhf.run.start import run_id

_LOG = logging.getLogger(__name__)
TENSORBOARD = "tensorboard"  # folder of its events in the run directory
RUN_TAG = "lowmem_rlhf.run"  # of a run in MLflow: which of ours it is


class Trackers:
    """The trackers of `training.report_to`, and accelerate's state on our device; nothing is placed or cast by it.

    Args:
        device: that the run trains on.
        recipe: of the run, resolved.
        run: its directory.
    """

    def __init__(self, device: torch.device, recipe: Recipe, run: RunDirectory) -> None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        self.accelerator = Accelerator(device_placement=False)
        self._recipe, self._run = recipe, run
        self._told: dict[str, GeneralTracker] = {}

    def begin(self, step: int) -> None:
        """Open the run in every tracker, or go on with it after a step."""
        for name in dict.fromkeys(self._recipe.training.report_to if self._run.writes else ()):
            with self._survived(name), _quietly():
                self._told[name] = _OPEN[name](self._recipe, self._run, step)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Report what was measured in or after a step; what is no finite number is left out."""
        numbers = {key: number(value) for key, value in metrics.items() if key != "step"}
        values = {key: value for key, value in numbers.items() if value is not None}
        for name, tracker in list(self._told.items()):
            with self._survived(name):
                tracker.log(_for_mlflow(values) if name == "mlflow" else values, step=step)

    def end(self) -> None:
        """Report that no more steps come."""
        for name, tracker in list(self._told.items()):
            with self._survived(name), _quietly():
                tracker.finish()
        self._told.clear()

    @contextmanager
    def _survived(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker's library raises: the run does not depend on it
            self._told.pop(name, None)
            _LOG.warning("training.report_to: %s failed and is told nothing more: %s", name, one_line(error))


def _tensorboard(recipe: Recipe, run: RunDirectory, step: int) -> GeneralTracker:
    """Write events into the run's own folder; steps that a resume takes again replace the ones before."""
    folder = str(run.path.absolute() / TENSORBOARD)
    tracker = TensorBoardTracker("", folder, purge_step=step + 1 if step else None)
    tracker.start()
    text = write_yaml(masked_values(recipe.model_dump(mode="json")))
    tracker.writer.add_text("recipe", "\n".join(f"    {line}" for line in text.splitlines()), global_step=step)
    tracker.writer.flush()
    return tracker


def _wandb(recipe: Recipe, run: RunDirectory, step: int) -> GeneralTracker:
    """Open a run of W&B: offline, in the run's own folder, unless the user has logged in or set WANDB_MODE."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT") or recipe.name,
        name=run.path.absolute().name,
        id=_id(run),
        resume="allow",
        dir=os.environ.get("WANDB_DIR") or str(run.path.absolute()),
        settings=wandb.Settings(silent=True, console="off"),
        **({"mode": "offline"} if _is_offline(wandb.setup().settings) else {}),
    )
    tracker.start()
    tracker.store_init_configuration(_flat(recipe))
    return tracker


def _is_offline(settings: Any) -> bool:
    """Whether the user of W&B has neither said how it works nor a key: in the environment, its settings or netrc."""
    if "WANDB_MODE" in os.environ or os.environ.get("WANDB_API_KEY") or getattr(settings, "api_key", None):
        return False
    try:
        return netrc(os.environ.get("NETRC")).authenticators(urlparse(settings.base_url).hostname or "") is None
    except (OSError, NetrcParseError):
        return True


class _Trackio(TrackioTracker):
    """accelerate's, which ends the run but leaves it as trackio's current one, to be ended again at exit."""

    def finish(self) -> None:
        import trackio

        trackio.finish()


def _trackio(recipe: Recipe, run: RunDirectory, step: int) -> GeneralTracker:
    """Open a run of trackio, local unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set; no dashboard is started."""
    tracker = _Trackio(
        os.environ.get("TRACKIO_PROJECT") or recipe.name,
        name=f"{run.path.absolute().name}-{_id(run)[:8]}",
        resume="allow",
        embed=False,
        config=_flat(recipe),
    )
    tracker.start()
    return tracker


def _mlflow(recipe: Recipe, run: RunDirectory, step: int) -> GeneralTracker:
    """Open a run of MLflow, where MLFLOW_TRACKING_URI says; the parameters of one that goes on stay as they were."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or recipe.name
    found = mlflow.search_runs(
        experiment_names=[experiment],
        filter_string=f"tags.`{RUN_TAG}` = '{_id(run)}'",
        max_results=1,
        output_format="list",
    )
    tracker = MLflowTracker(
        experiment,
        run_id=found[0].info.run_id if found else None,
        run_name=run.path.absolute().name,
        tags={RUN_TAG: _id(run)},
    )
    tracker.start()
    if not found:
        tracker.store_init_configuration(_flat(recipe))
    return tracker


_OPEN: dict[str, Callable[[Recipe, RunDirectory, int], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def _id(run: RunDirectory) -> str:
    """Return the run's own id, under which a resume finds it again."""
    known = run_id(run.path)
    if known is None:
        raise ValueError(f"{run.path} has no id in its local.json")
    return known


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values by dotted key, as trackers take a configuration; lists are JSON."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), below)
        elif isinstance(value, dict | list):
            flat[prefix] = json.dumps(value, ensure_ascii=False)
        elif value is not None:
            flat[prefix] = value

    add("", masked_values(recipe.model_dump(mode="json")))
    return flat


def _for_mlflow(values: dict[str, float]) -> dict[str, float]:
    """Return metrics under names that MLflow takes: letters, digits, ``_``, ``-``, ``.``, space, ``:`` and ``/``."""
    return {re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII): value for name, value in values.items()}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what trackers print about themselves out of the run's display."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
