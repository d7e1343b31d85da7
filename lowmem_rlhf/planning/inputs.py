"""What a plan is made from: the recipe, the device, the sizes of the model and the bytes that a run may take."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.memory.phases import peak_phase, phases
from lowmem_rlhf.planning.memory.resident import GIB, Components, Settings
from lowmem_rlhf.planning.time.estimate import StepTime, device_rates, has_terms
from lowmem_rlhf.planning.time.links import Ring
from lowmem_rlhf.planning.time.rates import Rates
from lowmem_rlhf.recipe.schema import Recipe

PINNED = "set in the recipe"


MARGIN = 0.04  # share of free memory left alone


@dataclass(frozen=True)
class PlanInputs:
    """What a plan is made from.

    Attributes:
        budget: bytes that a run may take.
        timed: settings are chosen by predicted time, where the device's speed is known.
        ring: the processes of which this device is one's, where there are several.
    """

    recipe: Recipe
    device: Device
    dims: ModelDimensions
    budget: int
    timed: bool = True
    ring: Ring | None = None

    @property
    def shards(self) -> int:
        """Processes that share the base; 1: each holds all of it."""
        return self.ring.processes if self.ring and self.recipe.hardware.shard_base else 1

    @property
    def on_cpu(self) -> bool:
        """Whether the run computes on the CPU, with the RAM as its budget."""
        return self.device.on_cpu

    @cached_property
    def rates(self) -> Rates | None:
        """What the card reaches, by which settings are chosen; None on a CPU, and where nobody tells."""
        decides = self.timed and not self.on_cpu and has_terms(self.dims)
        return device_rates(self.device) if decides else None

    def time(self, settings: Settings) -> StepTime:
        """Return the predicted time of a step.

        Raises:
            ValueError: nobody tells how fast the device is.
        """
        if self.rates is None:
            raise ValueError(f"nobody tells how fast {self.device.name} is")
        return StepTime(self.dims, self.recipe, settings, self.device, self.rates, self.ring)

    def pinned(self, key: str) -> Any:
        """Return the recipe's value of a setting, or None when it is left to the plan."""
        value = getattr(self.recipe.hardware, key)
        return None if value == "auto" else value

    def phases(self, settings: Settings) -> dict[str, Components]:
        """Return the predicted bytes of every phase."""
        return phases(self.dims, self.recipe, settings, self.device)

    def peak(self, settings: Settings, *names: str) -> int:
        """Return the predicted bytes of the largest of the named phases (of all, when none is named)."""
        return peak_phase(phases(self.dims, self.recipe, settings, self.device, names))[1]


def gib(count: float) -> str:
    """Return bytes as GiB with two digits."""
    return f"{count / GIB:.2f} GiB"


def budget_bytes(device: Device) -> int:
    """Return what a run may take: free memory less 4 % and what the process holds before its first tensor.

    That is the CUDA context (141 MiB; not when torch measured free memory, as it is open then), or on the CPU about
    768 MiB of Python and libraries.
    """
    return max(0, int(device.free_bytes * (1 - MARGIN)) - device.process_bytes)
