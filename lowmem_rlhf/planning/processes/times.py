"""How long a step takes in several processes. No torch.

Each samples and scores its prompts; then all have what was sampled, and the update is spread by tokens, so the slowest
process decides twice. What is sent meanwhile, gradients and samples, is added to that; gathers of a shared base run
beside the computing, and decide where they take longer (`StepTime`).
"""

from collections.abc import Sequence

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.memory.resident import Memory
from lowmem_rlhf.planning.processes.traffic import gradient_bytes, sample_bytes
from lowmem_rlhf.planning.processes.values import Process
from lowmem_rlhf.planning.time.estimate import RunTime, StepTime, device_rates, evaluations_of, has_terms
from lowmem_rlhf.planning.time.links import HOP, NETWORK_HOP, Ring
from lowmem_rlhf.planning.time.rates import Case, bus_bandwidth
from lowmem_rlhf.recipe.schema import Recipe

SAMPLED_GATHERS = 2  # what was sampled with its rewards, and its log-probs


def ring_of(devices: Sequence[Device], network_gbit: float | None, case: Case = "expected") -> Ring:
    """Return the ring of processes on these cards: its slowest link is a card's bus, or the network.

    Args:
        network_gbit: 10^9 bits a second between machines; None: there is one machine.
    """
    found = [device_rates(device, case) for device in devices]
    bandwidth = min(rates.bus if rates else bus_bandwidth(case) for rates in found)
    if network_gbit is None:
        return Ring(len(devices), bandwidth, HOP)
    return Ring(len(devices), min(bandwidth, network_gbit * 1e9 / 8), NETWORK_HOP)


def step_time(dims: ModelDimensions, process: Process, case: Case, ring: Ring) -> StepTime | None:
    """Return the time of a process's share by itself; None where nobody tells how fast its card is."""
    rates = device_rates(process.plan.device, case)
    if rates is None or process.plan.time is None or not has_terms(dims):
        return None
    return StepTime(dims, process.recipe, process.plan.settings, process.plan.device, rates, ring)


def phases_of(step: StepTime, process: Process, recipe: Recipe) -> dict[str, float]:
    """Return the seconds of a process's part of a step.

    Args:
        step: of its share, at least of one prompt.
        recipe: with the prompts of the whole step.
    """
    found = step.phases()
    planned = process.recipe.training.prompts_per_step
    part = process.share * recipe.training.prompts_per_step / planned  # the update's share is of tokens
    found["update"] = part * step.gradients() + step.optimizer()
    if not process.prompts and not step.gathering:  # who shares a base takes part in every pass
        found |= dict.fromkeys(("rollout", "score"), 0.0) if recipe.spec.samples else {}
    return found


def communication(recipe: Recipe, memory: Memory, ring: Ring) -> float:
    """Return the seconds of a step in which gradients are summed up and samples gathered."""
    summed = recipe.spec.updates(recipe) * ring.summing(gradient_bytes(memory))
    return summed + (ring.gathering(sample_bytes(recipe), SAMPLED_GATHERS) if recipe.spec.samples else 0.0)


def gathers_of(dims: ModelDimensions, processes: Sequence[Process], ring: Ring) -> float:
    """Return the passes over a shared base in a step, of the process with the most; 0 where it is not shared."""
    known = [step_time(dims, process, "expected", ring) for process in processes]
    return max((sum(step.gathers().values()) for step in known if step and step.gathering), default=0.0)


def _of_case(
    dims: ModelDimensions, recipe: Recipe, processes: Sequence[Process], network: float | None, case: Case
) -> tuple[dict[str, float], float] | None:
    """Return the seconds of a step by phase, and of the held-out examples, each of the slowest process."""
    ring = ring_of([process.plan.device for process in processes], network, case)
    steps = [step_time(dims, process, case, ring) for process in processes]
    each = [phases_of(step, process, recipe) for step, process in zip(steps, processes, strict=True) if step]
    if len(each) < len(steps):
        return None
    slowest = max(range(len(each)), key=lambda place: sum(each[place].values()) - each[place]["update"])
    found = dict(each[slowest])
    found["update"] = max(one["update"] for one in each)
    first = processes[0]
    memory = Memory(dims, first.recipe, first.plan.settings, first.plan.device)
    found["communication"] = communication(recipe, memory, ring)
    return found, max(step.evaluation() for step in steps if step)


def time_of(
    dims: ModelDimensions, recipe: Recipe, processes: Sequence[Process], network: float | None
) -> RunTime | None:
    """Return the predicted time of the run; None where nobody tells how fast one of the cards is."""
    kinds: tuple[Case, ...] = ("expected", "best", "worst")
    known: dict[Case, tuple[dict[str, float], float] | None] = {
        case: _of_case(dims, recipe, processes, network, case) for case in kinds
    }
    cases = {case: found for case, found in known.items() if found}
    if len(cases) < len(kinds):
        return None
    phases, evaluation = cases["expected"]
    steps = recipe.training.max_steps if recipe.training.num_train_epochs is None else None
    step = {case: sum(of_phases.values()) for case, (of_phases, _) in cases.items()}
    ends = (step["best"], step["worst"])
    if steps is None:
        return RunTime(phases, step["expected"], ends, evaluation, None, None, None)
    times = evaluations_of(recipe, steps)
    run = {case: steps * step[case] + times * held_out for case, (_, held_out) in cases.items()}
    between = (run["best"], run["worst"])
    return RunTime(phases, step["expected"], ends, evaluation, steps, run["expected"], between, times)
