"""The parts of ``bench``, the most telling first: what each is made of, how long it takes, where it cannot run.

No torch here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowmem_rlhf.bench.checkout import checkout
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.torch_build import is_torchs_own
from lowmem_rlhf.suggest import did_you_mean

Values = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What one process does.

    Attributes:
        function: as ``module:function``; it is given a `bench.work.Work` and a callback of progress.
        options: further keyword arguments.
    """

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One measurement, of one process or of several one after the other.

    Attributes:
        name: in ``--only`` and in the record.
        title: what is measured.
        tasks: the processes by name.
        on_a_card, on_a_cpu: seconds that it takes, roughly: a part that takes longer than what is left is left out.
        least: seconds with which it may begin all the same, as it counts what it has done by then; None: only whole.
        why_not: says why a device cannot be measured so; an empty text where it can.
        combine: makes the part's values of its tasks'.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    on_a_card: float
    on_a_cpu: float
    least: float | None = None
    why_not: Callable[[Device], str] = lambda device: ""
    combine: Callable[[Values], Values] = lambda values: values

    def seconds(self, device: Device) -> float:
        """Return how long it takes on a device, roughly."""
        return self.on_a_cpu if device.on_cpu else self.on_a_card


def only_task(values: Values) -> Values:
    """Return the values of a part's single task."""
    return next(iter(values.values()), {})


def with_ratio(values: Values) -> Values:
    """Add ours over TRL's, for every figure that both have."""
    if "ours" not in values or "trl" not in values:
        return values
    mine, theirs = values["ours"], values["trl"]
    ratio = {
        key: {phase: mine[key][phase] / theirs[key][phase] for phase in mine[key] if theirs[key].get(phase)}
        for key in ("seconds", "peak_bytes")
    }
    same = mine["prompt_lengths"] == theirs["prompt_lengths"]
    return {**values, "ratio": ratio, "same_prompts": same}


def _why_no_tests(device: Device) -> str:
    if not is_torchs_own(device.torch_device):
        return "the device tests run on a card that torch knows by itself"
    return "" if checkout() else "the tests are in a checkout of the repository, not in the installed package"


PREPARE = Task("lowmem_rlhf.bench.model:prepare")
PREPARE_SECONDS = 20.0  # for the bar; the budget counts what it really takes

PARTS = (
    Part(
        "graphs",
        "decoding with and without graphs",
        {"decoding": Task("lowmem_rlhf.bench.graphs:decoding")},
        on_a_card=75,
        on_a_cpu=40,
        combine=only_task,
    ),
    Part(
        "step",
        "a GRPO step against TRL's",
        {"ours": Task("lowmem_rlhf.bench.steps:ours"), "trl": Task("lowmem_rlhf.bench.steps:trl")},
        on_a_card=130,
        on_a_cpu=140,
        combine=with_ratio,
    ),
    Part(
        "plan",
        "the plan against a step",
        {"step": Task("lowmem_rlhf.bench.planned:step_against_plan")},
        on_a_card=75,
        on_a_cpu=60,
        combine=only_task,
    ),
    Part(
        "precisions",
        "NF4, int8 and 16-bit weights",
        {name: Task("lowmem_rlhf.bench.steps:ours", {"quantization": name}) for name in ("nf4", "int8", "none")},
        on_a_card=100,
        on_a_cpu=120,
    ),
    Part(
        "device_tests",
        "the device tests",
        {"tests": Task("lowmem_rlhf.bench.device_tests:run_tests")},
        on_a_card=300,
        on_a_cpu=300,
        least=60,
        why_not=_why_no_tests,
        combine=only_task,
    ),
)


def chosen(only: str | None) -> tuple[Part, ...]:
    """Return the parts that ``--only`` names, in the table's order; all without it.

    Raises:
        UserError: there is no such part, or none is named.
    """
    if only is None:
        return PARTS
    known = [part.name for part in PARTS]
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names:
        raise UserError(f"--only: got {only!r}; name one or several of {', '.join(known)}, with commas between them")
    for name in names:
        if name not in known:
            raise UserError(f"--only: there is no part {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
    return tuple(part for part in PARTS if part.name in names)


def find_task(name: str) -> Task:
    """Return a task by ``PART.TASK``, or ``prepare``.

    Raises:
        KeyError: there is none.
    """
    if name == "prepare":
        return PREPARE
    part, _, task = name.partition(".")
    return {one.name: one for one in PARTS}[part].tasks[task]
