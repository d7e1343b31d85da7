"""What a plan is made from: the recipe, the device, the sizes of the model and the bytes that a run may take."""

from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.memory.phases import peak_phase, phases
from lowmem_rlhf.planning.memory.resident import GIB, Components, Settings
from lowmem_rlhf.recipe.schema import Recipe

PINNED = "set in the recipe"


MARGIN = 0.04  # share of free memory left alone


@dataclass(frozen=True)
class PlanInputs:
    """What a plan is made from."""

    recipe: Recipe
    device: Device
    dims: ModelDimensions
    budget: int

    @property
    def on_cpu(self) -> bool:
        """Whether the run computes on the CPU, with the RAM as its budget."""
        return self.device.on_cpu

    def pinned(self, key: str) -> Any:
        """Return the recipe's value of a setting, or None when it is left to the plan."""
        value = getattr(self.recipe.hardware, key)
        return None if value == "auto" else value

    def phases(self, settings: Settings) -> dict[str, Components]:
        """Return the predicted bytes of every phase."""
        return phases(self.dims, self.recipe, settings, self.device)

    def peak(self, settings: Settings, *names: str) -> int:
        """Return the predicted bytes of the largest of the named phases (of all, when none is named)."""
        by_phase = self.phases(settings)
        return peak_phase({name: by_phase[name] for name in names or by_phase})[1]


def gib(count: float) -> str:
    """Return bytes as GiB with two digits."""
    return f"{count / GIB:.2f} GiB"


def budget_bytes(device: Device) -> int:
    """Return what a run may take: free memory less 4 % and what the process holds before its first tensor.

    That is the CUDA context (141 MiB; not when torch measured free memory, as it is open then), or on the CPU about
    768 MiB of Python and libraries.
    """
    return max(0, int(device.free_bytes * (1 - MARGIN)) - device.process_bytes)
