"""The trackers that a recipe reports to, by accelerate. One that fails is told nothing more, and the run goes on."""

import logging
import os
from typing import Any

import torch
from accelerate import Accelerator

from lowmem_rlhf.errors import one_line
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory

_LOG = logging.getLogger(__name__)


class Trackers:
    """accelerate's state on our device, with the recipe's trackers; nothing is placed or cast by it."""

    def __init__(self, device: torch.device, recipe: Recipe, run: RunDirectory) -> None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        names = list(recipe.training.report_to)
        folder = str(run.path.absolute())
        self.accelerator = Accelerator(device_placement=False, log_with=names or None, project_dir=folder)
        self._failed = not names
        if names:
            config = {"algorithm": recipe.algorithm, "model": recipe.model}
            self.accelerator.init_trackers(recipe.name, config=config)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Report a finished step."""
        self._told(lambda: self.accelerator.log(metrics, step=step))

    def end(self) -> None:
        """Report that no more steps come."""
        self._told(self.accelerator.end_training)

    def _told(self, tell: Any) -> None:
        if self._failed:
            return
        try:
            tell()
        except Exception as error:  # whatever a tracker's library raises: the run does not depend on it
            self._failed = True
            _LOG.warning("a tracker of training.report_to failed and is told nothing more: %s", one_line(error))
