"""The optimizer, its schedule, loss scaling for float16, and their state as safetensors and plain values.

What stays out: unpickling. A checkpoint's tensors are safetensors, its numbers JSON.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import get_scheduler

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.recipe.sections import TrainingConfig

OPTIMIZER = "optimizer.safetensors"  # a checkpoint's file of the state's tensors
INITIAL_LOSS_SCALE = 2.0**12  # torch's 65536 overflows float16 in the first steps and only loses them


class Optimizer:
    """Clips, steps and schedules; with float16 it scales the loss and skips a step whose gradients overflowed.

    Args:
        parameters: what trains, by name (fp32 masters).
        training: learning rate, schedule, clipping.
        optim: ``adamw`` or ``adamw_8bit``.
        total_steps: optimizer steps of the whole run, for the schedule.
        scale_loss: whether the activations are float16.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        training: TrainingConfig,
        optim: str,
        total_steps: int,
        device: torch.device,
        scale_loss: bool,
    ) -> None:
        self.parameters = parameters
        self.optim = optim
        self.max_grad_norm = training.max_grad_norm
        self.skipped = 0  # steps left out because float16 gradients overflowed
        self.taken = 0  # steps begun by this process: parameters may have changed since it was last lower
        self.stepping = False  # a step has begun and has not ended, or failed within
        settings: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
        with torch.device("cpu"):  # the step counters that the optimizers make for themselves
            if optim == "adamw_8bit":
                from bitsandbytes.optim import AdamW8bit

                self.torch_optimizer: torch.optim.Optimizer = AdamW8bit(list(parameters.values()), **settings)
            else:
                self.torch_optimizer = torch.optim.AdamW(list(parameters.values()), **settings)
            self.scheduler = get_scheduler(
                training.lr_scheduler_type, self.torch_optimizer, training.warmup_steps, max(total_steps, 1)
            )
            self.scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_LOSS_SCALE, enabled=scale_loss)
        if scale_loss:
            self.scaler.scale(torch.zeros((), dtype=torch.float32, device=device))  # makes the scale's tensor

    @property
    def loss_scale(self) -> float:
        """What a loss is to be multiplied with before its backward pass."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def zero_grad(self) -> None:
        """Give every parameter a zero gradient, so that a step without any loss still is an optimizer step."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def step(self) -> float:
        """Clip to ``max_grad_norm``, step, schedule; return the gradient's norm before clipping.

        Raises:
            RunError: the gradient is not finite, other than by an overflow of float16; no weight was changed.
        """
        self.scaler.unscale_(self.torch_optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        if not self.scaler.is_enabled() and not math.isfinite(norm):
            raise RunError(
                f"the gradient became {norm}; nothing of this step was kept. Lower training.learning_rate, and look at "
                "the last samples for what went wrong before"
            )
        before = self.loss_scale
        self.taken += 1
        self.stepping = True
        with torch.device("cpu"):
            self.scaler.step(self.torch_optimizer)
            self.scaler.update()
        self.stepping = False
        if self.loss_scale < before:
            self.skipped += 1
            if self.loss_scale < 1:
                raise RunError(
                    "float16 gradients overflow whatever the loss is scaled by; this model needs "
                    "hardware.compute_dtype=bfloat16 or float32"
                )
        else:
            self.scheduler.step()
        return norm

    def drop_gradients(self) -> None:
        """Give the gradients' memory back: until the next update it is the rollout's."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the optimizer's state (moments), where they lie, by ``parameter|name``."""
        return {place: value for place, value in self._state() if isinstance(value, torch.Tensor)}

    def plain(self) -> dict[str, Any]:
        """Return the rest of the state: plain values, fit for JSON."""
        return {
            "optim": self.optim,
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "scaler": self.scaler.state_dict(),
            "numbers": {place: value for place, value in self._state() if not isinstance(value, torch.Tensor)},
            "skipped": self.skipped,
        }

    def _state(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.parameters.items():
            # not state_dict(), where bitsandbytes wraps the 8-bit moments into one more dict
            for key, value in self.torch_optimizer.state.get(parameter, {}).items():
                yield f"{name}|{key}", value

    @torch.no_grad()
    def put_back(self, tensors: Mapping[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Be again as when `tensors` and `plain` gave these, copied since then; nothing is allocated on the device."""
        for name, parameter in self.parameters.items():
            state = self.torch_optimizer.state.get(parameter, {})
            for key in list(state):
                place = f"{name}|{key}"
                if place in tensors:
                    state[key].copy_(tensors[place])
                elif place in plain["numbers"]:
                    state[key] = plain["numbers"][place]
                else:
                    del state[key]
            if not state:
                self.torch_optimizer.state.pop(parameter, None)
        self._put_back_plain(plain)

    def _put_back_plain(self, plain: dict[str, Any]) -> None:
        with torch.device("cpu"):
            self.scheduler.last_epoch = plain["scheduler"]["last_epoch"] - 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimizer was not stepped first; it was, by the run before
                self.scheduler.step()
        if plain["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(plain["scaler"])
        self.skipped = plain["skipped"]

    def load(self, folder: Path, plain: dict[str, Any]) -> None:
        """Take over what a checkpoint holds: `tensors` in its file, and `plain`.

        Raises:
            UserError: the state belongs to other parameters or another optimizer.
        """
        if plain["optim"] != self.optim:
            raise UserError(
                f"the optimizer state in {folder} is {plain['optim']}'s, this run has {self.optim}; resume with "
                f"hardware.optim={plain['optim']}"
            )
        index = {name: i for i, name in enumerate(self.parameters)}
        state: dict[int, dict[str, Any]] = {}
        tensors = load_file(folder / OPTIMIZER, device="cpu")
        for place, value in [*tensors.items(), *plain["numbers"].items()]:
            name, _, key = place.partition("|")
            if name not in index:
                raise UserError(f"the optimizer state in {folder} has {name!r}, which this run does not train")
            state.setdefault(index[name], {})[key] = value
        if lacking := [name for name, i in index.items() if state and i not in state]:  # before the first step: all
            raise UserError(f"the optimizer state in {folder} lacks {lacking[0]}, which this run trains")
        whole = self.torch_optimizer.state_dict()
        with torch.device("cpu"):
            self.torch_optimizer.load_state_dict({**whole, "state": state})
        self._put_back_plain(plain)
