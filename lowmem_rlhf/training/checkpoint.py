"""Checkpoints: the adapter, the optimizer's state and the counters. Everything else follows from (seed, step)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.optimizer import OPTIMIZER, Optimizer
from lowmem_rlhf.training.trained_state import TrainedState

STATE = "state.json"


def save_checkpoint(run: RunDirectory, base: SharedBase, state: TrainedState, others: Sequence[str] = ()) -> Path:
    """Write checkpoints/step-N whole or not at all; return its folder. Roles besides the policy get folders in it.

    Args:
        base: whose adapters' names and configurations these are; its tensors are not read.
        state: what is saved.
    """
    folder = run.begin_checkpoint(state.step)
    base.save_adapter(folder, parameters=state.parameters)
    for role in others:
        base.save_adapter(folder / role, role, state.parameters)
    save_file(state.moments, folder / OPTIMIZER)
    values = {"step": state.step, "optimizer": state.optimizer, "counters": state.counters}
    (folder / STATE).write_text(json.dumps(values), encoding="utf-8")
    return run.finish_checkpoint(state.step)


def load_checkpoint(
    folder: Path, base: SharedBase, optimizer: Optimizer, others: Sequence[str] = ()
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint's state into the base and the optimizer; return its step and counters.

    Raises:
        UserError: the checkpoint is incomplete or of another model.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        base.load_role(folder)
        for role in others:
            base.load_role(folder / role, role)
        optimizer.load(folder, state["optimizer"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); delete it to resume from an "
            "earlier one"
        ) from error
    return int(state["step"]), state["counters"]
