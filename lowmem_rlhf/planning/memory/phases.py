"""How much memory a run takes, phase by phase: pure arithmetic in bytes, without torch.

A phase has moments (a layer's backward pass, the loss, ...); its need is that of the largest one, and a moment is the
sum of its components. What a pass holds in tokens stands in `shapes`, what a layer holds in `layers`, the moments of a
rollout in `rollout`. Letters: T tokens, h hidden size, V vocabulary, b bytes of a compute-dtype number.
"""

from collections.abc import Callable, Collection

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.memory.resident import ALLOCATOR_FACTOR, Components, Memory, Settings, total
from lowmem_rlhf.planning.shapes import samples_completions
from lowmem_rlhf.recipe.schema import Recipe


def phases(
    dims: ModelDimensions, recipe: Recipe, settings: Settings, device: Device, names: Collection[str] = ()
) -> dict[str, Components]:
    """Return bytes by component for rollout (where the run samples), scoring, update, optimizer and export.

    On a GPU every phase ends with what the caching allocator holds beyond what is in use (factor 1.125).

    Args:
        names: the phases to return; none: all of them.
    """
    from lowmem_rlhf.planning.memory.rollout import kept_bytes, rollout

    memory = Memory(dims, recipe, settings, device)
    resident = memory.resident()
    kept = {"graphs": kept_bytes(memory)} if settings.keep_graphs else {}
    if server := memory.server_between_rollouts():
        kept["server"] = server
    parts: dict[str, Callable[[], Components]] = {
        "rollout": lambda: resident | rollout(memory),
        "scoring": lambda: resident | kept | memory.scoring(),
        "update": lambda: resident | kept | memory.update(),
        "optimizer": lambda: resident | kept | memory.optimizer(),
        "export": memory.export,
    }
    if not samples_completions(recipe):
        del parts["rollout"]
    result = {name: part() for name, part in parts.items() if not names or name in names}
    factor = ALLOCATOR_FACTOR if memory.capabilities.caching_allocator else 1.0
    for components in result.values():
        ours = total(components) - components.get("server", 0)
        components["allocator"] = round(ours * (factor - 1))
    return result


def peak_phase(by_phase: dict[str, Components]) -> tuple[str, int]:
    """Return the largest phase and its bytes."""
    return max(((name, total(components)) for name, components in by_phase.items()), key=lambda item: item[1])
