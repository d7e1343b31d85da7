"""What a run does when memory runs out, beyond smaller sizes, and what it says when nothing helps."""

from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.host_embedding import embeddings_to_host, movable_embeddings
from lowmem_rlhf.engine.ladder import Ladder, Saving
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import MIB, capabilities
from lowmem_rlhf.hardware.memory import device_counter, free_bytes
from lowmem_rlhf.planning.advice import changes
from lowmem_rlhf.planning.inputs import gib
from lowmem_rlhf.planning.memory.phases import phases
from lowmem_rlhf.planning.memory.resident import GIB, Components, Settings, total
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.schema import Recipe

_UPDATE, _ROLLOUT = frozenset({"update"}), frozenset({"rollout"})
EVERY_PHASE = frozenset({"rollout", "scoring", "update", "optimizer"})


def savings_of(base: SharedBase, settings: Settings) -> list[Saving]:
    """Return what saves memory at a price and is not taken yet, the cheapest first."""
    found: list[Saving] = []
    if settings.rollout_weights != "quantized":
        found.append(Saving(_ROLLOUT, "rollout_weights", "quantized", lambda: None))  # the limits say it
    if settings.gradient_checkpointing is not True:
        recompute = lambda: base.set_gradient_checkpointing(True, settings.offload_checkpoints)  # noqa: E731
        found.append(Saving(_UPDATE, "gradient_checkpointing", True, recompute))
    if not capabilities(base.device).on_cpu:
        if not settings.offload_checkpoints:
            offload = lambda: base.set_gradient_checkpointing(True, offload=True)  # noqa: E731
            found.append(Saving(_UPDATE, "offload_checkpoints", True, offload))
        if movable_embeddings(base.model):
            found.append(Saving(EVERY_PHASE, "offload_embeddings", True, lambda: embeddings_to_host(base.model)))
    return found


def explain_shortage(recipe: Recipe, plan: Plan, ladder: Ladder) -> Callable[[str], str]:
    """Return what says of a phase what it takes with the ladder's sizes, what there is, and what would fit."""

    def explain(phase: str) -> str:
        free = available_bytes(ladder.device)
        settings = replace(plan.settings, **ladder.changed)
        dims = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
        by_phase = phases(dims, recipe, settings, plan.device)
        need = _need(by_phase, phase)
        helps = _what_fits(recipe, replace(plan, device=replace(plan.device, free_bytes=free)))
        remedy = f"try {helps}" if helps else "a card with more free memory is needed"
        return (
            f"{_size(need)} are predicted for it and {_size(free)} are there for this run; close other programs that "
            f"use the device, or {remedy}"
        )

    return explain


def _what_fits(recipe: Recipe, short: Plan) -> str:
    """Return changes with which a run fits on a plan's device, as its algorithm's planner knows them; or nothing."""
    try:
        resolve(recipe.spec.planner)(recipe, short.device, short.profile)
    except UserError as error:  # TRL's planner says in its refusal what would fit
        return str(error).rpartition("; try ")[2]
    return ", or ".join(changes(short, recipe))


def _size(count: int) -> str:
    return gib(count) if count >= GIB / 10 else f"{count / MIB:.1f} MiB"


def _need(by_phase: dict[str, Components], phase: str) -> int:
    """Return the predicted bytes of a phase; of what runs outside of a step those that it resembles."""
    if phase in by_phase:
        return total(by_phase[phase])
    if phase == "evaluation":
        return total(by_phase.get("rollout", by_phase["scoring"]))
    return sum(by_phase["update"][key] for key in ("weights", "embeddings", "adapters"))


def opening_ladder(recipe: Recipe, plan: Plan) -> Ladder:
    """Return the ladder of what comes before a run's first step, which has no sizes: it is tried once more."""
    device = torch.device(plan.device.torch_device)
    ladder = Ladder.of(plan.settings, device, recipe.generation.temperature)
    ladder.explain = explain_shortage(recipe, plan, ladder)
    return ladder


def available_bytes(device: torch.device) -> int:
    """Return the bytes of the device that this process holds or could have."""
    reserved = device_counter(device, "memory_reserved")
    held = int(reserved(device)) if reserved else psutil.Process().memory_info().rss
    return free_bytes(device) + held
