"""What the processes of a run agree on before it begins: its settings, and what each does of the work."""

from dataclasses import asdict, replace
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.detect import parse_device
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.run_plan import plan_with
from lowmem_rlhf.processes.shares import even
from lowmem_rlhf.processes.start import number_of_processes, rank_of_process
from lowmem_rlhf.processes.world import begun
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory

_PRECISION = ("nf4", "int8", "none")  # from the card with the least memory to the one with the most


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
    if refused:
        error = UserError(refused)
        error.said_elsewhere = rank_of_process() > 0
        raise error


def check_sharing(recipe: Recipe, plan: Plan) -> None:
    """Check that the processes can share one base, where they are to.

    Raises:
        UserError: they cannot.
    """
    if not recipe.hardware.shard_base:
        return
    if not begun().several:
        raise UserError("hardware.shard_base: is for several processes; start them with --processes N, or leave it out")
    if plan.settings.quantization == "int8":
        raise UserError(
            "hardware.shard_base: int8 weights cannot be shared out, as bitsandbytes keeps them beside the layer's "
            "parameters; set hardware.quantization to nf4 or none"
        )
    if plan.settings.offload_experts:
        raise UserError("hardware.offload_experts: with hardware.shard_base experts are shared out; leave it out")


def plan_of_processes(recipe: Recipe, plan: Plan) -> tuple[Plan, dict[str, Any]]:
    """Return this process's plan with the settings that all have to share, and what plan.json says of the processes.

    The base and the adapters have to be the same everywhere, so the precision and the adapter's rank are those of the
    card with the least room. What only cuts the work (micro-batches, rows at once) is each card's own. Each process
    gets as much of the work as its plan is fast.
    """
    world = begun()
    if not world.several:
        return plan, {}
    plans = world.gather((asdict(plan.settings), plan.device.name, plan.device.torch_device))
    least = min(range(world.size), key=lambda rank: (*_room(plans[rank][0]), rank))
    if least != world.rank and _shared(plans[least][0]) != _shared(plans[world.rank][0]):
        plan = plan_with(recipe, plans[least][0], f"as process {least} on {plans[least][1]} takes it")
    names = [name for _, name, _ in plans]
    world.alike = len(set(names)) == 1
    seconds = world.gather(plan.time.step if plan.time else None)
    world.proportions = even(world.size) if world.alike else _by_speed(seconds)
    told = [
        {"device": device, "name": name, "share": share}
        for (_, name, device), share in zip(plans, world.proportions, strict=True)
    ]
    note = f"one of {world.size} processes, with {world.proportions[world.rank]:.0%} of each step's work"
    plan = replace(plan, device=replace(plan.device, notes=(*plan.device.notes, note)))
    return plan, {"processes": told}


def _room(settings: dict[str, Any]) -> tuple[int, int, bool]:
    return (
        _PRECISION.index(settings["quantization"]) if settings["quantization"] in _PRECISION else len(_PRECISION),
        settings["lora"]["r"],
        settings["compute_dtype"] != "float16",
    )


def _shared(settings: dict[str, Any]) -> tuple[Any, ...]:
    return settings["quantization"], settings["lora"]["r"], settings["compute_dtype"], settings["optim"]


def _by_speed(seconds: list[float | None]) -> tuple[float, ...]:
    """Return proportions of the work from what a step takes each process alone; even ones where one does not know."""
    known = [one for one in seconds if one]
    if len(known) < len(seconds):
        return even(len(seconds))
    speeds = [1 / one for one in known]
    return tuple(speed / sum(speeds) for speed in speeds)


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
