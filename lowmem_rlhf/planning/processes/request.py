"""What somebody asks of a plan for several processes: how many, on which cards, in which machines. No torch here."""

import math
from dataclasses import dataclass

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.detect import first_cards
from lowmem_rlhf.hardware.profiles import find_profile, profile_device
from lowmem_rlhf.planning.advice import why_not
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.processes.plan import Card, check_rows, plan_processes
from lowmem_rlhf.planning.processes.values import ProcessesPlan
from lowmem_rlhf.planning.run_plan import plan_recipe, planned_device
from lowmem_rlhf.recipe.schema import Recipe

NETWORK_GBIT = 10.0  # between machines, where nobody says what there is


@dataclass(frozen=True)
class Cluster:
    """Processes on cards of one or several machines.

    Attributes:
        processes: one a card.
        machines: among which they are divided evenly.
        network_gbit: 10^9 bits a second from one machine to the next; None with one machine.
        profiles: names of the cards, one for all or one for each; none: those that are here.
    """

    processes: int
    machines: int
    network_gbit: float | None
    profiles: tuple[str, ...]


def cluster_of(
    processes: int | None, machines: int | None, network: float | None, profile: str | None
) -> Cluster | None:
    """Return what was asked for, or None for one process.

    Args:
        profile: a card's name, or one for each process with commas between them.

    Raises:
        UserError: it cannot be.
    """
    names = tuple(name.strip() for name in profile.split(",") if name.strip()) if profile else ()
    if processes is None:
        for name, value in (("machines", machines), ("network", network)):
            if value is not None:
                raise UserError(f"{name}: got {value:g}, which is for several processes; say how many: processes")
        if len(names) > 1:
            raise UserError(
                f"profile: got {len(names)} cards, but one process is planned; ask for {len(names)} processes"
            )
        return None
    machines = 1 if machines is None else machines
    if processes < 1:
        raise UserError(f"processes: got {processes}; give 1 or more, one for each card")
    if machines < 1 or processes % machines:
        raise UserError(f"machines: got {machines}, among which {processes} processes cannot be divided evenly")
    if network is not None and not (network > 0 and math.isfinite(network)):
        raise UserError(f"network: got {network:g}; give 10^9 bits a second between two machines, such as 10")
    if network is not None and machines == 1:
        raise UserError(f"network: got {network:g}, but all processes are in one machine; say in how many: machines")
    if len(names) not in (0, 1, processes):
        raise UserError(f"profile: got {len(names)} cards for {processes} processes; name one for all, or one for each")
    if processes == 1:
        return None
    between = (NETWORK_GBIT if network is None else network) if machines > 1 else None
    return Cluster(processes, machines, between, names)


def cards_of(recipe: Recipe, cluster: Cluster) -> list[Card]:
    """Return the cards of the processes, by process.

    Without names they are those of this machine, in their order, where it has enough; else all are like the one that a
    run in one process would take.

    Raises:
        UserError: a profile is not known, or no such device is here.
    """
    if cluster.profiles:
        found = [find_profile(name) for name in cluster.profiles]
        named = [(profile_device(one, recipe.hardware.vram), one.key) for one in found]
        return named if len(named) > 1 else named * cluster.processes
    names = first_cards(recipe.hardware.device, cluster.processes // cluster.machines)
    if recipe.hardware.profile != "auto" or not names:
        return [planned_device(recipe)] * cluster.processes
    hardware = [recipe.hardware.model_copy(update={"device": name}) for name in names]
    return [planned_device(recipe.model_copy(update={"hardware": one})) for one in hardware] * cluster.machines


def plan_of(recipe: Recipe, cluster: Cluster | None) -> Plan | ProcessesPlan:
    """Return the plan of a recipe in one process, or in those of a cluster.

    Raises:
        UserError: as `plan_recipe` and `plan_processes`.
    """
    if cluster is None:
        return plan_recipe(recipe)
    check_rows(recipe, cluster.processes)
    return plan_processes(recipe, cards_of(recipe, cluster), cluster.machines, cluster.network_gbit)


def advice_of(made: Plan | ProcessesPlan, recipe: Recipe, cluster: Cluster | None) -> str:
    """Return what stands in the way of a plan that does not fit, and what to change; empty where it fits."""
    if made.fits:
        return ""
    if isinstance(made, Plan):
        return why_not(made, recipe)
    shared = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"shard_base": True})})
    own = made.tightest.recipe.model_copy(update={"hardware": recipe.hardware, "lora": recipe.lora})
    said = why_not(made.tightest.plan, own)
    if cluster and not recipe.hardware.shard_base:
        try:
            helps = plan_of(shared, cluster).fits
        except UserError:
            helps = False
        said += "; or hardware.shard_base=true, with which the cards share the base" if helps else ""
    return said
