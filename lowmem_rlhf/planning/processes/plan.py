"""The plan of a run in several processes, one a card. No torch here.

Each process holds the base, the adapters and the optimizer's state; prompts with their groups are shared out whole, and
the update by tokens. So each card has a plan of its own, for its share of the prompts, and all agree on what is of the
run (`agreement`). Cards that differ get shares by their predicted speed.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.memory.resident import Memory
from lowmem_rlhf.planning.plan import Plan, make_plan
from lowmem_rlhf.planning.processes.agreement import Agreement, agreement
from lowmem_rlhf.planning.processes.times import communication, gathers_of, phases_of, ring_of, step_time, time_of
from lowmem_rlhf.planning.processes.traffic import bytes_sent
from lowmem_rlhf.planning.processes.values import Alone, Process, ProcessesPlan
from lowmem_rlhf.planning.processes.words import assumptions, warnings
from lowmem_rlhf.planning.shapes import step_tokens
from lowmem_rlhf.planning.time.links import Ring
from lowmem_rlhf.processes.shares import even, proportions, whole_shares
from lowmem_rlhf.recipe.schema import Recipe

Card = tuple[Device, str]  # a device, and its profile's name


def plan_processes(
    recipe: Recipe, cards: Sequence[Card], machines: int = 1, network_gbit: float | None = None
) -> ProcessesPlan:
    """Choose the settings of a run in one process for each of these cards.

    Args:
        cards: by process; those of a machine follow one another. A CPU's processes share its cores and its memory.
        machines: among which they are divided evenly.
        network_gbit: 10^9 bits a second from one machine to the next; None with one machine.

    Raises:
        UserError: as `make_plan`, for one of the cards.
    """
    each = len(cards) // machines
    parts = [(_part(device, each), profile) for device, profile in cards]
    ring = ring_of([device for device, _ in parts], network_gbit)
    planner = _Planner(parts, ring)
    equal = _shared(recipe, math.ceil(recipe.training.prompts_per_step / len(parts)), 1 / len(parts))
    whole = equal if recipe.hardware.shard_base else recipe  # what is of the run is as in a run in one process
    common = agreement(recipe, [planner.plan(place, whole) for place in planner.kinds])
    planner.common = common
    first = [planner.plan(place, equal) for place in range(len(parts))]
    speeds = _speeds(first, equal)
    shares = proportions(speeds) if speeds else even(len(parts))
    processes: list[Process] = []
    for place, prompts in enumerate(whole_shares(recipe.training.prompts_per_step, shares)):
        own = _shared(recipe, prompts, shares[place])
        made = planner.plan(place, own)
        agreed = _shared(common.recipe, prompts, shares[place])
        speed = speeds[place] if speeds else None
        processes.append(Process(place // each, made, agreed, shares[place], prompts, speed, {}))
    dims = model_dimensions(recipe.model, recipe.revision, recipe.trust_remote_code)
    return _plan_of(recipe, dims, processes, machines, network_gbit, _alone(recipe, cards))


def _plan_of(
    recipe: Recipe,
    dims: ModelDimensions,
    processes: list[Process],
    machines: int,
    network_gbit: float | None,
    alone: Alone | None,
) -> ProcessesPlan:
    """Put together what the processes do, how long it takes, and what they send."""
    ring = ring_of([process.plan.device for process in processes], network_gbit)
    steps = [step_time(dims, process, "expected", ring) for process in processes]
    timed = [
        replace(process, phases=phases_of(step, process, recipe)) if step else process
        for process, step in zip(processes, steps, strict=True)
    ]
    one = timed[0]
    memory = Memory(dims, one.recipe, one.plan.settings, one.plan.device)
    gathers = gathers_of(dims, timed, ring)
    time = time_of(dims, recipe, timed, network_gbit)
    return ProcessesPlan(
        tuple(timed),
        machines,
        network_gbit,
        bytes_sent(recipe, memory, len(timed), gathers),
        communication(recipe, memory, ring) if time else None,
        gathers * max((step.gathering for step in steps if step), default=0.0) if time else None,
        time,
        alone,
        assumptions(timed, network_gbit),
        warnings(recipe, timed, alone),
    )


class _Planner:
    """Makes each plan once: cards that are alike, with as many prompts, have the same."""

    def __init__(self, cards: Sequence[Card], ring: Ring) -> None:
        self.cards, self.ring = cards, ring
        self.kinds = [place for place, card in enumerate(cards) if cards.index(card) == place]
        self.common: Agreement | None = None
        self._pinned: set[int] = set()  # kinds of cards that would do otherwise
        self._made: dict[tuple[int, int, int, bool], Plan] = {}

    def plan(self, place: int, recipe: Recipe) -> Plan:
        """Return the plan of a process with a share of a recipe, with what all agree on where that is known."""
        kind = self.cards.index(self.cards[place])
        if kind not in self._pinned:
            made = self._plan(kind, recipe, agreed=False)
            if self.common is None or self.common.holds(made):
                return made
            self._pinned.add(kind)
        return self._plan(kind, recipe, agreed=True)

    def _plan(self, kind: int, recipe: Recipe, agreed: bool) -> Plan:
        device, profile = self.cards[kind]
        key = (kind, recipe.training.prompts_per_step, recipe.data.eval_size, agreed)
        if key not in self._made:
            common = self.common if agreed else None
            pinned = recipe
            if common:
                update = {"hardware": common.recipe.hardware, "lora": common.recipe.lora}
                pinned = recipe.model_copy(update=update)
            made = _planned(pinned, device, profile, self.ring)
            self._made[key] = common.explained(made) if common else made
        return self._made[key]


def _planned(recipe: Recipe, device: Device, profile: str, ring: Ring | None) -> Plan:
    planner = resolve(recipe.spec.planner)
    if planner is make_plan:
        return make_plan(recipe, device, profile, ring)
    if ring and recipe.hardware.shard_base:
        raise UserError(f"hardware.shard_base: {recipe.algorithm} is not planned with a shared base; leave it out")
    made: Plan = planner(recipe, device, profile)
    return made


def check_rows(recipe: Recipe, processes: int) -> None:
    """Check that each process can have a row of the update.

    Raises:
        UserError: there are more processes than rows.
    """
    prompts, group = recipe.training.prompts_per_step, recipe.spec.completions(recipe)
    rows, what = (prompts * group, "completions") if recipe.spec.samples else (prompts, "examples")
    if processes > rows:
        raise UserError(
            f"processes: got {processes}, but a step has only {rows} {what}; give at most {rows}, or raise "
            "training.prompts_per_step"
        )


def _part(device: Device, processes: int) -> Device:
    """Return what one of the processes of a machine has of a device: all of a card, a part of a CPU."""
    if not device.on_cpu or processes == 1:
        return device
    note = f"{processes} processes share the memory and the cores of this CPU"
    return replace(
        device,
        total_bytes=device.total_bytes // processes,
        free_bytes=device.free_bytes // processes,
        cores=max(1, device.cores // processes) if device.cores else device.cores,
        notes=(*device.notes, note),
    )


def _shared(recipe: Recipe, prompts: int, share: float) -> Recipe:
    """Return the recipe of a process: with so many prompts a step, at least one, and a share of the evaluation."""
    training = recipe.training.model_copy(update={"prompts_per_step": max(1, prompts)})
    held = math.ceil(round(recipe.data.eval_size * share, 6))  # a third of 9 is 3
    data = recipe.data.model_copy(update={"eval_size": held})
    return recipe.model_copy(update={"training": training, "data": data})


def _speeds(plans: Sequence[Plan], recipe: Recipe) -> list[float]:
    """Return the predicted tokens a second of plans of equal shares; nothing where one is not predicted."""
    found = [step_tokens(recipe) / plan.time.step for plan in plans if plan.time]
    return found if len(found) == len(plans) else []


def _alone(recipe: Recipe, cards: Sequence[Card]) -> Alone | None:
    """Return the step of the one card that is the fastest at it, of those that hold the whole run."""
    hardware = recipe.hardware.model_copy(update={"shard_base": False, "offload_base": False})
    whole = recipe.model_copy(update={"hardware": hardware})
    found: list[Alone] = []
    for place, (device, profile) in enumerate(cards):
        if cards.index((device, profile)) < place:
            continue
        try:
            made = _planned(whole, device, profile, None)
        except UserError:  # TRL's planner says so of what does not fit
            continue
        if made.fits and made.time:
            found.append(Alone(device.name, made.settings.quantization, made.time.step))
    return min(found, key=lambda one: one.step, default=None)
