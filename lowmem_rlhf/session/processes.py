"""What the processes of a run agree on before it begins: its settings, and what each does of the work."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.detect import parse_device
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.processes.plan import plan_processes
from lowmem_rlhf.planning.processes.request import NETWORK_GBIT
from lowmem_rlhf.planning.run_plan import ResumedRecipe, resumed_plan, running_device, running_plan
from lowmem_rlhf.processes.start import number_of_processes, rank_of_process
from lowmem_rlhf.processes.world import begun
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.server import SERVERS, ServerConfig
from lowmem_rlhf.run.directory import RunDirectory


def check_processes(recipe: Recipe) -> None:
    """Check that a recipe can be trained by several processes.

    Raises:
        UserError: it cannot.
    """
    kind, index = parse_device(recipe.hardware.device)
    refused = ""
    if recipe.spec.run is not None:
        refused = f"algorithm: {recipe.algorithm} trains in one process; start it without --processes"
    elif index is not None:
        refused = (
            f"hardware.device: got {recipe.hardware.device} for {number_of_processes()} processes, each of which has a "
            f"card of its own; give {kind}, or leave it at auto"
        )
    server = recipe.generation.server or ServerConfig()
    if not refused and recipe.generation.engine in SERVERS and (server.url is None or server.sleep):
        refused = (
            f"generation.server: {number_of_processes()} processes ask one server, which none of them starts or sends "
            "to sleep; start one, give its address as url, and leave sleep out"
        )
    if refused:
        error = UserError(refused)
        error.said_elsewhere = rank_of_process() > 0
        raise error


def run_plan_of(recipe: Recipe, path: Path, resume: bool) -> tuple[Plan, dict[str, Any]]:
    """Return this process's plan, and what plan.json says of the processes where there are several.

    All know every card and make the plan of all of them from it, so that they agree: on the base's precision and the
    adapter's rank, and on how much of the work each does.

    Args:
        path: of the run.
        resume: it goes on.

    Raises:
        UserError: no such device, or the recipe asks for what it cannot do.
    """
    world = begun()
    if not world.several:
        return (resumed_plan(recipe, path) if resume else running_plan(recipe)), {}
    world.take_part = None  # of the base of an earlier run in these processes, which it would keep
    began = ResumedRecipe.of(recipe, path) if resume else ResumedRecipe(recipe, [])
    cards = world.gather((running_device(recipe), socket.gethostname()))
    machines = len({host for _, host in cards})
    evenly = machines if world.size % machines == 0 else 1
    made = plan_processes(began.recipe, [card for card, _ in cards], evenly, NETWORK_GBIT if evenly > 1 else None)
    world.proportions = tuple(process.share for process in made.processes)
    world.alike = len({process.plan.device.name for process in made.processes}) == 1
    own = made.processes[world.rank]
    note = f"process {world.rank} of {world.size}, with {own.share:.0%} of each step's work"
    device = replace(own.plan.device, notes=(*own.plan.device.notes, note))
    told = [
        {"device": one.plan.device.torch_device, "name": one.plan.device.name, "share": one.share}
        for one in made.processes
    ]
    return began.explained(replace(own.plan, device=device, time=made.time)), {"processes": told}


def check_same_recipe(recipe: Recipe) -> None:
    """Check that all processes were started with one recipe; what is said of the hardware may differ.

    Raises:
        UserError: another one has another.
    """
    own = {key: value for key, value in recipe.model_dump().items() if key != "hardware"}
    for rank, other in enumerate(every := begun().gather(own)):
        if keys := sorted(_different(every[0], other)):
            raise UserError(
                f"process {rank} was started with another recipe than process 0: {', '.join(keys)}; start all of them "
                "with the same"
            )


def _different(one: Any, other: Any, key: str = "") -> Iterator[str]:
    """Yield the keys, with dots, whose values are not the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            yield from _different(one.get(name), other.get(name), f"{key}.{name}" if key else name)
    elif one != other:
        yield key


def check_same_rows(inputs: dict[str, Any]) -> None:
    """Check that all processes have read the same rows.

    Args:
        inputs: what inputs.json is to hold.

    Raises:
        UserError: they have not.
    """
    for rank, data in enumerate(every := begun().gather(inputs["data"])):
        if data != every[0]:
            raise UserError(
                f"process {rank} has read other rows of the data than process 0; the files have to be the same "
                "everywhere"
            )


def check_same_folder(run: RunDirectory) -> None:
    """Check that all processes see the checkpoint that the run goes on from.

    Raises:
        UserError: the folder of one is another's of the same name.
    """
    latest = run.latest_checkpoint()
    steps = begun().gather(latest[0] if latest else 0)
    if apart := [rank for rank, step in enumerate(steps) if step != steps[0]]:
        raise UserError(
            f"process {apart[0]} finds the checkpoint of step {steps[apart[0]]} in {run.path}, and process 0 that of "
            f"step {steps[0]}; --output has to be a folder that all machines share"
        )
