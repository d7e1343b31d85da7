"""The plan of a run in several processes as a value. No torch."""

from dataclasses import asdict, dataclass
from typing import Any

from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.processes.traffic import Traffic
from lowmem_rlhf.planning.time.estimate import RunTime
from lowmem_rlhf.recipe.schema import Recipe

PREDICTED = "predicted; no run on several cards stands behind it"


@dataclass(frozen=True)
class Process:
    """One of the processes, with a card of its own.

    Attributes:
        machine: which one it is on, from 0.
        plan: settings and memory with its share of a step's prompts; its ``time`` is that of this share alone.
        recipe: with that share, and with what all processes agree on.
        share: of a step's tokens, from 0 to 1, which the update is spread by.
        prompts: of a step, whole groups, which it samples, rewards and scores.
        tokens_per_second: predicted, on an equal share; None where nobody tells how fast the card is.
        phases: seconds of rollout, score and update in a step; empty where they are not predicted.
    """

    machine: int
    plan: Plan
    recipe: Recipe
    share: float
    prompts: int
    tokens_per_second: float | None
    phases: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        plan = self.plan.to_dict()
        return {
            "machine": self.machine,
            "share": self.share,
            "prompts": self.prompts,
            "tokens_per_second": self.tokens_per_second,
            "phases": dict(self.phases),
            **{key: plan[key] for key in ("fits", "verdict", "device", "profile", "settings", "reasons", "memory")},
        }


@dataclass(frozen=True)
class Alone:
    """What one card takes for a step by itself: of the cards of a run the one that is the fastest at it.

    Attributes:
        device: its name.
        quantization: of the base there.
        step: seconds.
    """

    device: str
    quantization: str
    step: float


@dataclass(frozen=True)
class ProcessesPlan:
    """What several processes will do with the memory of their cards.

    Attributes:
        processes: in their order; those of a machine follow one another.
        machines: among which they are divided evenly.
        network_gbit: 10^9 bits a second from one machine to the next; None with one machine.
        traffic: what each process sends in a step.
        communication: seconds of a step in which nothing is computed, for gradients and samples; None where times are
            not predicted.
        gathering: seconds of a step in which layers of a shared base are gathered, beside computing.
        time: of the run; ``phases`` are the slowest process's, and ``communication``. None as above.
        alone: the step of one card; None where it does not fit on one, or is not predicted.
        assumptions: what the times rest on, a sentence each.
        warnings: what is to be known before such a run, a sentence each.
    """

    processes: tuple[Process, ...]
    machines: int
    network_gbit: float | None
    traffic: Traffic
    communication: float | None
    gathering: float | None
    time: RunTime | None
    alone: Alone | None
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the run fits on every card."""
        return all(process.plan.fits for process in self.processes)

    @property
    def tightest(self) -> Process:
        """The process whose peak takes the most of its budget."""
        return max(
            self.processes, key=lambda one: one.plan.memory["peak_bytes"] / max(1, one.plan.memory["budget_bytes"])
        )

    @property
    def speed_up(self) -> float | None:
        """How many times as fast as one card; None where that is not predicted, or one card does not hold the run."""
        return self.alone.step / self.time.step if self.alone and self.time else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what ``plan --json`` prints.

        The keys of a plan are those of the card with the least room; ``time`` is the run's.
        """
        return {
            **self.tightest.plan.to_dict(),
            "time": self.time.to_dict() if self.time else None,
            "processes": {
                "predicted": PREDICTED,
                "count": len(self.processes),
                "machines": self.machines,
                "network_gbit": self.network_gbit,
                "cards": [one.to_dict() for one in self.processes],
                "sent_bytes": self.traffic.to_dict(),
                "sent_to_next_machine_bytes": self.traffic.total if self.machines > 1 else 0,
                "communication_seconds": self.communication,
                "gathering_seconds": self.gathering,
                "alone": asdict(self.alone) if self.alone else None,
                "speed_up": self.speed_up,
                "assumptions": list(self.assumptions),
                "warnings": list(self.warnings),
            },
        }
