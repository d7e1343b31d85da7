"""accelerate's state for a run, with the trackers that the recipe reports to."""

import os

import torch
from accelerate import Accelerator

from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory


def accelerator_of(device: torch.device, recipe: Recipe, run: RunDirectory) -> Accelerator:
    """Return accelerate's state on our device, with the recipe's trackers; nothing is placed or cast by it."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    trackers = list(recipe.training.report_to)
    accelerator = Accelerator(device_placement=False, log_with=trackers or None, project_dir=str(run.path.absolute()))
    if trackers:
        accelerator.init_trackers(recipe.name, config={"algorithm": recipe.algorithm, "model": recipe.model})
    return accelerator
