"""What to change when a plan does not fit: each change is planned for, and said only if the run then fits."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from lowmem_rlhf.architecture.catalogue import smaller_than
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.inputs import PINNED, gib
from lowmem_rlhf.planning.memory.phases import peak_phase
from lowmem_rlhf.planning.plan import Plan, plan_for, shortage
from lowmem_rlhf.planning.shapes import length_keys
from lowmem_rlhf.planning.time.links import Ring
from lowmem_rlhf.planning.time.rates import bus_bandwidth
from lowmem_rlhf.recipe.schema import Recipe

SAID = 3  # changes at most
SHORTEST = 32  # tokens: a shorter answer is no advice


def why_not(plan: Plan, recipe: Recipe) -> str:
    """Return what stands in the way of a plan that does not fit and what to change; an empty string if it fits."""
    if plan.fits:
        return ""
    phase, _ = peak_phase(plan.memory["phases"])
    lack = shortage(phase, plan.memory["phases"][phase], plan.memory["budget_bytes"])
    suggestions = changes(plan, recipe)
    helps = f"try {', or '.join(suggestions)}" if suggestions else "a card with more free memory is needed"
    by = "by its estimate " if plan.verdict == "unknown" else ""
    return f"{by}the plan does not fit on {plan.device.name}: {lack}; {helps}"


def warning(plan: Plan) -> str:
    """Return what to say before a run that nobody knows to fit; an empty string where it is known."""
    if plan.verdict != "unknown":
        return ""
    low, high = map(gib, plan.peak_bytes_range)
    return (
        f"warning: whether this run fits is not known: its memory is only estimated, at {low} to {high} where "
        f"{gib(plan.device.free_bytes)} are free on {plan.device.name}; hardware.probe=true measures it before the "
        "first step"
    )


def changes(plan: Plan, recipe: Recipe) -> list[str]:
    """Return the changes with which the run fits, the least painful first, with what it then takes; at most three."""
    return [
        f"{text} (then {gib(made.memory['peak_bytes'])} of {gib(made.memory['budget_bytes'])})"
        for text, made in islice(_fitting(plan, recipe), SAID)
    ]


def _fitting(plan: Plan, recipe: Recipe) -> Iterator[tuple[str, Plan]]:
    """Yield changes in words, with the plan of the run that then fits."""
    dims = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
    pinned = [key for key, reason in plan.reasons.items() if reason.startswith(PINNED) and key != "lora"]
    unpinned = [(f"hardware.{key}=auto", _with(recipe, "hardware", **{key: "auto"})) for key in pinned]
    if recipe.lora.r != "auto":
        unpinned.append(("lora.r=auto", _with(recipe, "lora", r="auto")))
    if len(pinned) > 1:
        free = _with(recipe, "hardware", **dict.fromkeys(pinned, "auto"))
        unpinned.append(("leaving all of hardware.* to the plan", free))
    for text, changed in unpinned:
        if planned := _planned(changed, plan, dims):
            yield text, planned
    for key in reversed(length_keys(recipe)):
        shorter = partial(_shorter, plan, recipe, dims, key)
        length = longest_that_fits(length_keys(recipe)[key], partial(shorter, timed=False))
        if length and (planned := shorter(length)):
            yield f"{key}={length}", planned
    for name, smaller in smaller_than(dims):
        if planned := _planned(recipe, plan, smaller):
            yield f"model={name}", planned
            break


def longest_that_fits(most: int, fits: Callable[[int], object]) -> int:
    """Return the largest multiple of 32 tokens, at most ``most``, for which ``fits`` says something true; else 0."""
    low, high = 0, most // SHORTEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * SHORTEST) else (low, middle - 1)
    return low * SHORTEST


def _planned(recipe: Recipe, plan: Plan, dims: ModelDimensions, timed: bool = True) -> Plan | None:
    """Return the plan of a changed recipe for the same device if it fits; ``timed`` as `plan_for` has it."""
    shards = plan.settings.base_shards
    ring = Ring(shards, bus_bandwidth()) if shards > 1 else None
    try:
        changed_plan = plan_for(recipe, plan.device, plan.profile, dims, timed, ring)
    except UserError:  # a change that cannot be, such as more positions than a smaller model has
        return None
    return changed_plan if changed_plan.fits else None


def _shorter(
    plan: Plan, recipe: Recipe, dims: ModelDimensions, key: str, length: int, timed: bool = True
) -> Plan | None:
    section, _, name = key.partition(".")
    return _planned(_with(recipe, section, **{name: length}), plan, dims, timed)


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    before = getattr(recipe, section)
    changed = {**before, **values} if isinstance(before, dict) else before.model_copy(update=values)
    return recipe.model_copy(update={section: changed})
