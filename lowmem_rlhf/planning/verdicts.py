"""Whether a run fits, as far as it is known, and between which numbers of bytes its peak lies. No torch here."""

from typing import Any, Literal

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.planning.memory.resident import ALLOCATOR_HIGH, Components, total

Verdict = Literal["yes", "no", "unknown"]

# known from counts, whatever a layer does
HELD = ("weights", "gathered_layers", "embeddings", "adapters", "optimizer_state")
# Of an update what layers without terms took at most, over Llama's: with Mamba 3.8, else padded 2.6, packed 1.2.
ESTIMATE_HIGH = 4.0


def verdict_of(dims: ModelDimensions, memory: dict[str, Any], on_cpu: bool) -> tuple[Verdict, tuple[int, int]]:
    """Return the verdict on a plan's memory, and the range of its peak in bytes.

    The range of a model with terms of its own goes from live tensors alone to a wasteful allocator. Of another one it
    goes from what lies on the device in any case (weights, adapters, moments) to four times the estimate of what is
    left, in a wasteful allocator. On a CPU it is the range of what the process shows.
    """
    fits = memory["peak_bytes"] <= memory["budget_bytes"]
    if dims.known:
        verdict: Verdict = "yes" if fits else "no"
        low, high = memory["low_bytes"], memory["high_bytes"]
    else:
        held = max(_held(components) for components in memory["phases"].values())
        weights = max(parts["weights"] + parts["embeddings"] for parts in memory["phases"].values())
        verdict = "no" if weights > memory["budget_bytes"] else "unknown"
        low = held
        high = max(_held(parts) + round(ESTIMATE_HIGH * _rest(parts)) for parts in memory["phases"].values())
        high = high if on_cpu else round(high * ALLOCATOR_HIGH)
    if on_cpu:
        beside = {key: size for key, size in memory["process"].items() if key != "live_tensors"}
        low, high = low + total(beside) - beside["allocator"], high + total(beside)
    return verdict, (low, high)


def _held(components: Components) -> int:
    return sum(components.get(key, 0) for key in HELD)


def _rest(components: Components) -> int:
    return total(components) - components["allocator"] - _held(components)
