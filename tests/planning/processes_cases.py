"""Recipes, cards and plans for the tests of several processes."""

from functools import cache

from lowmem_rlhf.architecture import catalogue
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.profiles import find_profile, profile_device
from lowmem_rlhf.planning.processes.plan import plan_processes
from lowmem_rlhf.planning.processes.values import ProcessesPlan
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.schema import Recipe

QWEN, QWEN_14B = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-14B"


def recipe_of(*changes: str, name: str = "grpo_gsm8k") -> Recipe:
    return load_recipe(name, changes, quiet=True)


def named(*profiles: str) -> list[tuple[Device, str]]:
    return [(profile_device(find_profile(name)), name) for name in profiles]


def dims(model: str = QWEN) -> ModelDimensions:
    found = catalogue.find(model)
    assert found is not None
    return found


@cache
def planned(
    *profiles: str, changes: tuple[str, ...] = (), machines: int = 1, network: float | None = None
) -> ProcessesPlan:
    return plan_processes(recipe_of(*changes), named(*profiles), machines, network)
