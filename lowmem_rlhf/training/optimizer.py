"""The optimizer, its schedule, loss scaling for float16, and their state as safetensors and plain values.

What stays out: unpickling. A checkpoint's tensors are safetensors, its numbers JSON.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import get_scheduler

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.processes.gradients import same_parameters, sum_gradients
from lowmem_rlhf.processes.world import current
from lowmem_rlhf.recipe.sections import TrainingConfig

OPTIMIZER = "optimizer.safetensors"  # a checkpoint's file of the state's tensors
INITIAL_LOSS_SCALE = 2.0**12  # torch's 65536 overflows float16 in the first steps and only loses them
# optimizer steps in a row that may be left out because a number is not finite: one odd batch is survived, and more than
# a few in a row are no longer the batch's fault
MOST_SKIPPED = 5


@dataclass(frozen=True)
class OwnRate:
    """Parameters that learn at a rate of their own, and whose gradients are clipped by themselves.

    Attributes:
        names: theirs.
        learning_rate: at the top of the schedule, which is that of all.
        max_grad_norm: of their gradients.
    """

    names: frozenset[str]
    learning_rate: float
    max_grad_norm: float


class Optimizer:
    """Clips, steps and schedules; a step whose loss or gradient is not finite is left out.

    With float16 the loss is scaled, and a step whose gradients overflowed makes the scale smaller. A step whose
    gradient is exactly zero leaves weights and moments as they are, where TRL's optimizer drifts on by its momentum and
    its weight decay; the schedule goes on.

    Attributes:
        skipped: steps left out so far because a number was not finite.
        at_step: the step of the run that is being taken, for messages.
        total_steps: optimizer steps of the whole run.
        own_norm: the norm of the gradients of ``own`` in the last step, before clipping.

    Args:
        parameters: what trains, by name (fp32 masters).
        training: learning rate, schedule, clipping.
        optim: ``adamw`` or ``adamw_8bit``.
        total_steps: optimizer steps of the whole run, for the schedule.
        scale_loss: whether the activations are float16.
        own: parameters with a rate of their own; None: there are none.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        training: TrainingConfig,
        optim: str,
        total_steps: int,
        device: torch.device,
        scale_loss: bool,
        own: OwnRate | None = None,
    ) -> None:
        self.own, self.own_norm = own, 0.0
        names = own.names if own else frozenset()
        shared, apart = ([name for name in parameters if (name in names) == mine] for mine in (False, True))
        self.parameters = {name: parameters[name] for name in (*shared, *apart)}  # in the order of the groups
        self.optim = optim
        self.max_grad_norm = training.max_grad_norm
        self.total_steps = total_steps
        self.skipped = 0
        self.at_step = 0
        self._remarks: list[str] = []
        self._in_a_row, self._fault = 0, ""  # steps left out one after the other, and what the first of them met
        self.taken = 0  # steps begun by this process: parameters may have changed since it was last lower
        self.effective = 0  # those of them that were not left out, at a learning rate above 0
        self.stepping = False  # a step has begun and has not ended, or failed within
        settings: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
        groups: list[dict[str, Any]] = [{"params": [parameters[name] for name in shared]}]
        if own:
            groups.append({"params": [parameters[name] for name in apart], "lr": own.learning_rate})
        with torch.device("cpu"):  # the step counters that the optimizers make for themselves
            if optim == "adamw_8bit":
                from bitsandbytes.optim import AdamW8bit

                self.torch_optimizer: torch.optim.Optimizer = AdamW8bit(groups, **settings)
            else:
                self.torch_optimizer = torch.optim.AdamW(groups, **settings)
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

    def leave_out(self, names: Iterable[str]) -> None:
        """Let the next step leave these parameters and their moments as they are."""
        for name in names:
            self.parameters[name].grad = None

    def zero_grad(self) -> None:
        """Give every parameter a zero gradient, so that a step without any loss still is an optimizer step."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def step(self, loss: float = 0.0, **before: float) -> float:
        """Clip to ``max_grad_norm``, step, schedule; return the gradient's norm before clipping.

        Among several processes the gradients are summed first, so each has to have the gradient of its share of the
        loss.

        Args:
            loss: of which this is the gradient, unscaled; the step is left out where it is not finite.
            before: numbers that the loss was made of, by name and in the order in which they were computed: the first
                that is not finite is named as the cause.

        Raises:
            RunError: loss or gradient was not finite in `MOST_SKIPPED` steps in a row, or float16 overflows at every
                scale; none of these steps changed a weight.
        """
        world = current()
        if not all(world.gather(math.isfinite(loss))):  # the loss scale has no part in it, and stays as it is
            name, value = next(((n, v) for n, v in before.items() if not math.isfinite(v)), ("loss", loss))
            self._leave_out(f"the {name.replace('_', ' ')} ({value})")
            return math.nan
        sum_gradients(world, list(self.parameters.values()))
        self.scaler.unscale_(self.torch_optimizer)
        names = self.own.names if self.own else frozenset()
        norm = self._clip([p for name, p in self.parameters.items() if name not in names], self.max_grad_norm)
        if self.own:  # in the order of the parameters: sums of another order round otherwise
            own = [p for name, p in self.parameters.items() if name in names]
            self.own_norm = self._clip(own, self.own.max_grad_norm)
        broken = next((one for one in (norm, self.own_norm) if not math.isfinite(one)), None)
        if broken is not None and not self.scaler.is_enabled():
            self._leave_out(f"the gradient ({broken})")
            return norm
        if norm == 0 and not any(bool(p.grad.any()) for p in self.parameters.values() if p.grad is not None):
            self._let_be()
        else:
            self._take()
            same_parameters(world, list(self.parameters.values()))
        return norm

    def _clip(self, parameters: Sequence[nn.Parameter], most: float) -> float:
        """Clip the gradients of these to a norm, where they are finite or float16's; return their norm before."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = float(total)
        if not math.isfinite(norm) and all(bool(one.isfinite().all()) for one in gradients):
            return self._clip_beyond_float32(gradients, most)
        if math.isfinite(norm) or self.scaler.is_enabled():
            nn.utils.clip_grads_with_norm_(parameters, most, total)
        return norm

    def say(self) -> list[str]:
        """Return the sentences that are worth saying since this was last called."""
        remarks, self._remarks = self._remarks, []
        return remarks

    def _take(self) -> None:
        before, rate = self.loss_scale, self.learning_rate
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
            self._in_a_row = 0
            self.effective += bool(rate)
            self.scheduler.step()

    def _let_be(self) -> None:
        """Go on in the schedule without a step: nothing was to be learned, so nothing moves."""
        if self.scaler.is_enabled():
            self.scaler.update()  # what unscale_ began
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer was not stepped first
            self.scheduler.step()

    def _clip_beyond_float32(self, gradients: Sequence[torch.Tensor], most: float) -> float:
        """Clip finite gradients whose norm is above float32's largest number; return the norm."""
        norm = math.hypot(*(float(one.double().norm()) for one in gradients))
        for one in gradients:
            one.copy_(one.double().mul_(min(1.0, most / norm)))
        return norm

    def _leave_out(self, what: str) -> None:
        """Count a step that is not taken, and say so once in a row.

        Raises:
            RunError: it is one too many.
        """
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == 1:
            self._fault = f"{what} of step {self.at_step}" if self.at_step else what
            self._remarks.append(
                f"{self._fault} is not finite: the optimizer step is left out, no weight was changed; after "
                f"{MOST_SKIPPED} such steps in a row the run ends"
            )
        if self._in_a_row >= MOST_SKIPPED:
            raise RunError(
                f"{MOST_SKIPPED} optimizer steps in a row had a number that is not finite, and none of them was taken; "
                f"the first was {self._fault}. {self._remedy()}"
            )

    def _remedy(self) -> str:
        lower = f"ower training.learning_rate (now {self.learning_rate:g}), and look at the last samples and metrics"
        if self.scaler.is_enabled():
            return f"Set hardware.compute_dtype=bfloat16 or float32, or l{lower} for what went wrong before"
        return f"L{lower} for what went wrong before"

    def why_left_out(self) -> str:
        """Return why steps were left out, and what to do."""
        if self._fault:
            return f"the first was left out for {self._fault}, which is not finite. {self._remedy()}"
        return (
            f"the gradients overflowed float16 in every step, and the loss scale is down to {self.loss_scale:g}; take "
            "more steps, or hardware.compute_dtype=bfloat16 or float32"
        )

    def check_weights(self) -> None:
        """Check that every weight that trains is a finite number.

        Raises:
            RunError: one is not.
        """
        largest = nn.utils.get_total_norm([p.detach() for p in self.parameters.values()], math.inf)
        if math.isfinite(float(largest)):
            return
        broken = [name for name, p in self.parameters.items() if not bool(p.isfinite().all())]
        raise RunError(
            f"{len(broken)} of {len(self.parameters)} trained tensors are no longer finite after step {self.at_step} "
            f"({broken[0]} first): the optimizer's step was too large; lower training.learning_rate (now "
            f"{self.learning_rate:g}; 1e-5 to 1e-3 are usual for adapters)"
        )

    def drop_gradients(self) -> None:
        """Give the gradients' memory back: until the next update it is the rollout's."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the optimizer's state (moments), where they lie, by ``parameter|name``."""
        return {place: value for place, value in self._state() if isinstance(value, torch.Tensor)}

    def plain(self) -> dict[str, Any]:
        """Return the rest of the state: plain values, fit for JSON."""
        stepped = {place.partition("|")[0] for place, _ in self._state()}
        waiting = [name for name in self.parameters if name not in stepped] if stepped else []
        return {
            **({"waiting": waiting} if waiting else {}),  # parameters that no step has changed yet, while others were
            "optim": self.optim,
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "scaler": self.scaler.state_dict(),
            "numbers": {place: value for place, value in self._state() if not isinstance(value, torch.Tensor)},
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "fault": self._fault,
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
            self.scaler._per_optimizer_states.clear()  # what a step that failed has unscaled is unscaled no longer
        self.skipped = plain["skipped"]
        self._in_a_row, self._fault = plain.get("in_a_row", 0), plain.get("fault", "")
        self._remarks = []

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
        waiting = plain.get("waiting", ())
        # before the first step all are
        if lacking := [name for name, i in index.items() if state and i not in state and name not in waiting]:
            raise UserError(f"the optimizer state in {folder} lacks {lacking[0]}, which this run trains")
        whole = self.torch_optimizer.state_dict()
        with torch.device("cpu"):
            self.torch_optimizer.load_state_dict({**whole, "state": state})
        self._put_back_plain(plain)
