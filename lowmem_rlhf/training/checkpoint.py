"""Checkpoints: the adapter, the optimizer's state and the counters. Everything else follows from (seed, step)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.checkpoints import read_checkpoint
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.proof import Damaged
from lowmem_rlhf.training.optimizer import OPTIMIZER, Optimizer
from lowmem_rlhf.training.trained_state import TrainedState

_MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")  # torch's and bitsandbytes': of a parameter's shape
# what a state that no hash proves may do to whoever reads it
_UNREADABLE = (Damaged, OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


def save_checkpoint(
    run: RunDirectory, base: SharedBase, state: TrainedState, others: Sequence[str] = (), healthy: bool = True
) -> Path:
    """Write checkpoints/step-N whole or not at all; return its folder. Roles besides the policy get folders in it.

    Args:
        base: whose adapters' names and configurations these are; its tensors are not read.
        state: what is saved.
        others: those roles.
        healthy: training is in order; the latest checkpoint that is so is never deleted for later ones.

    Raises:
        RunError: the disk has not the room, or the system refuses to write.
    """
    needed = sum(one.nbytes for one in (*state.parameters.values(), *state.moments.values()))
    with run.new_checkpoint(state.step, healthy, needed) as (folder, values):
        base.save_adapter(folder, parameters=state.parameters)
        for role in others:
            base.save_adapter(folder / role, role, state.parameters)
        save_file(state.moments, folder / OPTIMIZER)
        values.update(optimizer=state.optimizer, counters=state.counters)
    return folder.with_name(f"step-{state.step}")


def load_checkpoint(
    folder: Path, base: SharedBase, optimizer: Optimizer, others: Sequence[str] = ()
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint's state into the base and the optimizer; return its step and counters.

    Raises:
        UserError: the checkpoint is damaged, incomplete or of another model.
    """
    try:
        state = read_checkpoint(folder)
        counters = dict(state["counters"])
        counters["learned_tokens"] = int(counters["learned_tokens"])
        base.load_role(folder)
        for role in others:
            base.load_role(folder / role, role)
        optimizer.load(folder, state["optimizer"])
        misfit = "" if "format" in state else _misfit(optimizer)  # of before: no hash tells whose file it is
    except _UNREADABLE as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({_words(error)}); delete it to resume from an earlier one"
        ) from error
    if misfit:
        raise UserError(
            f"the optimizer state in {folder} does not fit: {misfit}; put the checkpoint's own optimizer.safetensors "
            "back, or delete the checkpoint to resume from an earlier one"
        )
    return int(state["step"]), counters


def _misfit(optimizer: Optimizer) -> str:
    """Return why the state that was loaded is another step's or model's; nothing where it is not."""
    steps = optimizer.scheduler.last_epoch
    for name, parameter in optimizer.parameters.items():
        state = optimizer.torch_optimizer.state.get(parameter, {})
        for key in _MOMENTS:
            if key in state and state[key].shape != parameter.shape:
                return f"{key} of {name} is {tuple(state[key].shape)}, and the parameter {tuple(parameter.shape)}"
        if state and int(state["step"]) != steps:
            return f"{name} has taken {int(state['step'])} optimizer steps, and the schedule {steps}"
    return ""


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, Damaged) else f"{type(error).__name__}: {error}"
