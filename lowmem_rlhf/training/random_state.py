"""The global random states, for work that is done twice: none of ours draws from them, but a user's function may."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowmem_rlhf.hardware.memory import device_counter


@dataclass(frozen=True)
class RandomState:
    """The states of Python, NumPy and torch, on the CPU and on one device, at one moment."""

    device: torch.device
    python: Any
    numpy: Any
    cpu: torch.Tensor
    on_device: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Return the states as they are."""
        of_device = device_counter(device, "get_rng_state")
        return cls(
            device,
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            of_device(device) if of_device else None,
        )

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        put_back = device_counter(self.device, "set_rng_state")
        if put_back and self.on_device is not None:
            put_back(self.on_device, self.device)
