"""The plan of a recipe on the device that it names or that is here. No torch here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.profiles import find_profile, match_profile, parse_bytes, profile_device
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.field_roles import fields_with
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import HardwareConfig
from lowmem_rlhf.run.directory import RunDirectory


def planned_device(recipe: Recipe) -> tuple[Device, str]:
    """Return the device to plan for and its profile's name, without touching it.

    A named profile (or ``vram``) stands for a card that need not be here.

    Raises:
        UserError: no such device or profile, or an unusable amount of memory.
    """
    hardware = recipe.hardware
    if hardware.profile != "auto":
        profile = find_profile(hardware.profile)
        return profile_device(profile, hardware.vram), profile.key
    device = detect(hardware.device)
    profile = match_profile(device)
    return _limited(replace(device, speed=profile.speed), hardware.vram), profile.key


def _limited(device: Device, vram: str | None) -> Device:
    if vram is None:
        return device
    limit = parse_bytes(vram)
    note = f"planned for {vram} as hardware.vram says"
    return replace(device, total_bytes=limit, free_bytes=min(limit, device.free_bytes), notes=(*device.notes, note))


def plan_recipe(recipe: Recipe) -> Plan:
    """Choose every setting of a recipe for its device (see `planned_device`)."""
    _check_one_process(recipe)
    device, profile = planned_device(recipe)
    return _planner(recipe)(recipe, device, profile)


def _check_one_process(recipe: Recipe) -> None:
    if recipe.hardware.shard_base:
        raise UserError("hardware.shard_base: got true, but in one process there is nobody to share the base with")


def _planner(recipe: Recipe) -> Callable[[Recipe, Device, str], Plan]:
    return resolve(recipe.spec.planner)


def in_one_process(recipe: Recipe) -> Recipe:
    """Return the recipe with the whole base in one process, as what is done with a finished run has it."""
    whole = recipe.hardware.model_copy(update={"shard_base": False, "offload_base": False})
    return recipe.model_copy(update={"hardware": whole}) if recipe.hardware.shard_base else recipe


def running_device(recipe: Recipe) -> tuple[Device, str]:
    """Return the device of a run on this machine: a named profile lends its memory, the device that is here computes.

    Raises:
        UserError: as `planned_device`.
    """
    device, profile = planned_device(recipe)
    if not device.is_present:
        here = detect(recipe.hardware.device)
        here = replace(here, speed=match_profile(here).speed)
        free = min(device.free_bytes, here.free_bytes)
        device = replace(here, total_bytes=device.total_bytes, free_bytes=free, bf16=device.bf16 and here.bf16)
    return device, profile


def running_plan(recipe: Recipe) -> Plan:
    """Plan for a run on this machine, in one process (see `running_device`)."""
    _check_one_process(recipe)
    device, profile = running_device(recipe)
    return _planner(recipe)(recipe, device, profile)


@dataclass(frozen=True)
class ResumedRecipe:
    """The recipe of a run that goes on.

    Attributes:
        recipe: with the settings of the run that would change what is computed.
        pinned: their names, of those that the recipe leaves to the plan.
    """

    recipe: Recipe
    pinned: Sequence[str]

    @classmethod
    def of(cls, recipe: Recipe, path: Path) -> "ResumedRecipe":
        """Return what the run in a folder began with."""
        began = RunDirectory(path).plan().get("settings", {})
        numeric = fields_with(HardwareConfig, changes_numbers=True)  # they stay, whatever memory is free today
        pinned = {key: began[key] for key in numeric if getattr(recipe.hardware, key) == "auto" and key in began}
        lora = recipe.lora
        shape = {key: began["lora"][key] for key in ("r", "lora_alpha") if began and getattr(lora, key) == "auto"}
        update = {"hardware": recipe.hardware.model_copy(update=pinned), "lora": lora.model_copy(update=shape)}
        return cls(recipe.model_copy(update=update), list(pinned))

    def explained(self, plan: Plan) -> Plan:
        """Return a plan of the recipe with why these settings are what they are."""
        return replace(plan, reasons={**plan.reasons, **dict.fromkeys(self.pinned, "as the run began")})


def resumed_plan(recipe: Recipe, path: Path) -> Plan:
    """Plan as `running_plan`, with the settings of the run in ``path`` that would change what is computed."""
    resumed = ResumedRecipe.of(recipe, path)
    return resumed.explained(running_plan(resumed.recipe))


def planned(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe with the adapter's shape that the plan chose: a part of what is learned, so of the run."""
    shape = {key: plan.settings.lora[key] for key in ("r", "lora_alpha")}
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update=shape)})
