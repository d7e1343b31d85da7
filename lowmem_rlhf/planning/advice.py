"""What to change when a plan does not fit: each change is planned for, and said only if the run then fits."""

from collections.abc import Iterator
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.choices import PINNED, gib
from lowmem_rlhf.planning.dimensions import ModelDimensions, model_dimensions
from lowmem_rlhf.planning.memory import peak_phase
from lowmem_rlhf.planning.plan import Plan, plan_for, shortage
from lowmem_rlhf.planning.shapes import length_keys
from lowmem_rlhf.recipe import Recipe

SAID = 3  # changes at most
SHORTEST = 32  # tokens: a shorter answer is no advice


def why_not(plan: Plan, recipe: Recipe) -> str:
    """Return what stands in the way of a plan that does not fit and what to change; an empty string if it fits."""
    if plan.fits:
        return ""
    phase, _ = peak_phase(plan.memory["phases"])
    lack = shortage(phase, plan.memory["phases"][phase], plan.memory["budget_bytes"])
    found = changes(plan, recipe)
    helps = f"try {', or '.join(found)}" if found else "a card with more free memory is needed"
    return f"the plan does not fit on {plan.device.name}: {lack}; {helps}"


def changes(plan: Plan, recipe: Recipe) -> list[str]:
    """Return the changes with which the run fits, the least painful first, with what it then takes; at most three."""
    dims = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
    found: list[str] = []
    for text, changed, sizes in _candidates(plan, recipe, dims):
        if len(found) == SAID:
            break
        fitting = _planned(changed, plan, sizes)
        if fitting is not None:
            share = f"{gib(fitting.memory['peak_bytes'])} of {gib(fitting.memory['budget_bytes'])}"
            found.append(f"{text} (then {share})")
    return found


def _candidates(plan: Plan, recipe: Recipe, dims: ModelDimensions) -> Iterator[tuple[str, Recipe, ModelDimensions]]:
    """Yield changes in words, with the changed recipe and the sizes of its model."""
    pinned = [key for key, reason in plan.reasons.items() if reason.startswith(PINNED) and key != "lora"]
    for key in pinned:
        yield f"hardware.{key}=auto", _with(recipe, "hardware", **{key: "auto"}), dims
    if recipe.lora.r != "auto":
        yield "lora.r=auto", _with(recipe, "lora", r="auto"), dims
    if len(pinned) > 1:
        yield (
            "leaving all of hardware.* to the plan",
            _with(recipe, "hardware", **dict.fromkeys(pinned, "auto")),
            dims,
        )
    for key in reversed(length_keys(recipe)):
        if (length := _longest(key, plan, recipe, dims)) is not None:
            yield f"{key}={length}", _with_length(recipe, key, length), dims
    for name, smaller in _smaller_models(dims):
        if _planned(recipe, plan, smaller) is not None:
            yield f"model={name}", recipe, smaller
            break


def _longest(key: str, plan: Plan, recipe: Recipe, dims: ModelDimensions) -> int | None:
    """Return the largest multiple of 32 tokens for a key with which the run fits; None if there is none."""
    low, high = 0, length_keys(recipe)[key] // SHORTEST
    while low < high:
        middle = (low + high + 1) // 2
        if _planned(_with_length(recipe, key, middle * SHORTEST), plan, dims) is not None:
            low = middle
        else:
            high = middle - 1
    return low * SHORTEST or None


def _smaller_models(dims: ModelDimensions) -> list[tuple[str, ModelDimensions]]:
    from lowmem_rlhf.planning.catalogue import smaller_than

    return smaller_than(dims)


def _planned(recipe: Recipe, plan: Plan, dims: ModelDimensions) -> Plan | None:
    """Return the plan of a changed recipe for the same device if it fits."""
    try:
        made = plan_for(recipe, plan.device, plan.profile, dims)
    except UserError:  # a change that cannot be, such as more positions than a smaller model has
        return None
    return made if made.fits else None


def _with_length(recipe: Recipe, key: str, length: int) -> Recipe:
    section, _, name = key.partition(".")
    return _with(recipe, section, **{name: length})


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
