"""What is to be said of a plan for several processes, in sentences. No torch here."""

from collections.abc import Sequence

from lowmem_rlhf.planning.processes.values import Alone, Process
from lowmem_rlhf.planning.time.links import HOP, NETWORK_HOP
from lowmem_rlhf.planning.time.rates import bus_bandwidth
from lowmem_rlhf.recipe.schema import Recipe


def assumptions(processes: Sequence[Process], network_gbit: float | None) -> tuple[str, ...]:
    """Return what the predicted times rest on."""
    expected, least, most = (bus_bandwidth(case) / 1e9 for case in ("expected", "worst", "best"))
    found = []
    if not all(process.plan.device.on_cpu for process in processes):
        found.append(
            f"between cards of a machine {expected:g} GB/s over PCIe ({least:g} to {most:g}) and {HOP * 1e6:g} µs a "
            "hop: assumed, as no profile says how a slot is wired"
        )
    if network_gbit is not None:
        found.append(f"between machines {network_gbit:g} Gbit/s and {NETWORK_HOP * 1e6:g} µs a hop")
    found.append("collective operations go round in a ring; all texts have their full length")
    if any(process.plan.settings.base_shards > 1 for process in processes):
        found.append("the next layer is gathered while one computes, so the slower of both decides")
    return tuple(found)


def warnings(recipe: Recipe, processes: Sequence[Process], alone: Alone | None) -> tuple[str, ...]:
    """Return what is to be known before such a run."""
    found = []
    prompts, count = recipe.training.prompts_per_step, len(processes)
    if not _alike(processes):
        found.append(_one_base(processes))
    idle = [place for place, process in enumerate(processes) if not process.prompts]
    if idle and recipe.spec.samples:
        those, have, them = ("process", "has", "it takes") if len(idle) == 1 else ("processes", "have", "they take")
        found.append(
            f"{those} {_numbers(idle)} {have} no prompt of a step's {prompts} (training.prompts_per_step): groups stay "
            f"whole; {them} part in the update only"
        )
    elif recipe.spec.samples and prompts % count and _alike(processes):
        most = max(process.prompts for process in processes)
        found.append(
            f"{prompts} prompts a step are not divided evenly among {count} processes: all wait for those with {most}; "
            f"take a multiple of {count} as training.prompts_per_step"
        )
    if any(process.tokens_per_second is None for process in processes) and not _alike(processes):
        found.append("how fast the cards are is not predicted, so they have equal shares")
    if alone and alone.quantization != (ours := processes[0].plan.settings.quantization):
        found.append(f"one card alone would take other weights ({alone.quantization}) than these processes ({ours})")
    return tuple(found)


def _one_base(processes: Sequence[Process]) -> str:
    plans = [process.plan for process in processes]
    smallest = min(plans, key=lambda plan: plan.memory["budget_bytes"])
    settings = smallest.settings
    weights = "unquantized" if settings.quantization == "none" else settings.quantization
    said = (
        f"every process has the same base, or their policies would differ: {weights} weights in "
        f"{settings.compute_dtype}, as the smallest card takes them ({smallest.device.name})"
    )
    without = next((plan.device.name for plan in plans if plan.device.half_dtype == "float16"), None)
    return f"{said}; {without} has no bfloat16" if without and settings.compute_dtype == "float16" else said


def _alike(processes: Sequence[Process]) -> bool:
    return all(process.plan.device == processes[0].plan.device for process in processes)


def _numbers(places: Sequence[int]) -> str:
    """Return numbers in words: ``2``, ``2 and 3``, ``2 to 7`` where they follow one another."""
    if len(places) > 2 and places[-1] - places[0] == len(places) - 1:
        return f"{places[0]} to {places[-1]}"
    return " and ".join([", ".join(map(str, places[:-1])), str(places[-1])]) if len(places) > 1 else str(places[0])
