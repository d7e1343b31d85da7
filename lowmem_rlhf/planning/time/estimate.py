"""How long a step and a run take: the passes of a step by phase, and their seconds. No torch.

Every prompt and completion is taken to have its full length, unless lengths are given; rewards that run elsewhere than
in this package's passes, and loading, are left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from lowmem_rlhf.algorithms.spec import sampled_lengths
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.limits import LOOK, seen_room, slot_room
from lowmem_rlhf.planning.memory.resident import Memory, Settings
from lowmem_rlhf.planning.memory.rollout import decodes_by_graphs
from lowmem_rlhf.planning.shapes import (
    PackedShape,
    prompts_shape,
    reference_adapters,
    rollout_rows,
    samples_completions,
    step_shape,
)
from lowmem_rlhf.planning.time.links import Ring
from lowmem_rlhf.planning.time.passes import Passes
from lowmem_rlhf.planning.time.rates import Case, Rates, cpu_rates, rates
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import REWARD_ADAPTER
from lowmem_rlhf.recipe.server import SERVERS

STARTED_ONE_BY_ONE = 2.0  # kernels of a token decoded in waves, as a multiple of those over slots
CAPTURES = 3  # passes started one by one for a graph: a warm-up, the capture, and the pass that it is held against
WAIT = 50e-6  # seconds in which the host waits for a token, where it looks at each


@dataclass(frozen=True)
class RunTime:
    """The predicted time of a run, in seconds.

    Attributes:
        phases: of one step, by the names that metrics have: ``rollout``, ``score``, ``update``.
        step, step_range: of one step, and between which ends it lies.
        evaluation: of the held-out examples once.
        steps: of the run; None where they follow from data that were not read.
        run, run_range: of all steps, with every evaluation; None without ``steps``.
        evaluations: of the run, before, after and between; None without ``steps``.
    """

    phases: dict[str, float]
    step: float
    step_range: tuple[float, float]
    evaluation: float
    steps: int | None
    run: float | None
    run_range: tuple[float, float] | None
    evaluations: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``plan --json`` has them."""
        named = {"step": "step_seconds", "step_range": "step_seconds_range", "evaluation": "evaluation_seconds"}
        named |= {"run": "run_seconds", "run_range": "run_seconds_range"}
        return {
            named.get(key, key): list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunTime":
        """Return the value that `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it gave something else.
        """
        ends = values["run_seconds_range"]
        return cls(
            dict(values["phases"]),
            values["step_seconds"],
            _pair(values["step_seconds_range"]),
            values["evaluation_seconds"],
            values["steps"],
            values["run_seconds"],
            None if ends is None else _pair(ends),
            values.get("evaluations"),
        )


def _pair(values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def device_rates(device: Device, case: Case = "expected") -> Rates | None:
    """Return what a device reaches; None where nobody tells how fast it is."""
    if device.on_cpu:
        return cpu_rates(device.cores, device.avx512_bf16, case) if device.cores else None
    return rates(device.speed, case) if device.speed else None


def has_terms(dims: ModelDimensions) -> bool:
    """Whether the time of a model's passes can be told: not that of a mixture whose routing is not known."""
    return not dims.expert_parameters or dims.experts is not None


class StepTime:
    """The time of a step with given settings.

    Args:
        dims, recipe, settings, device: of the run.
        rates: of the device.
        ring: the processes that share the base; None where one holds all of it.
    """

    def __init__(
        self,
        dims: ModelDimensions,
        recipe: Recipe,
        settings: Settings,
        device: Device,
        rates: Rates,
        ring: Ring | None = None,
    ) -> None:
        self.recipe, self.settings, self.spec, self.rates = recipe, settings, recipe.spec, rates
        self.memory = Memory(dims, recipe, settings, device)
        self.passes = Passes(self.memory, rates)
        self.gathering = 0.0  # seconds of gathering all layers of a shared base once
        if ring and settings.base_shards > 1:
            fetched = self.memory.shard() / rates.bus if settings.offload_base else 0.0
            self.gathering = ring.gathering(self.memory.base_layers(), dims.num_layers) + fetched

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase of a step."""
        found = {"rollout": self.rollout(), "score": self.score()} if self.spec.samples else {}
        if self.recipe.generation.engine in SERVERS:
            found.pop("rollout", None)  # nothing is known of how fast a server is
        return {**found, "update": self.update()}

    def step(self) -> float:
        """Return the seconds of a step."""
        return sum(self.phases().values())

    def gathers(self) -> dict[str, float]:
        """Return how often each phase of a step passes over the layers: so often a shared base is gathered.

        A pass back needs them once more. Layers that are computed again in it are there then (FSDP2's hook before a
        pass back gathers them, and the one before their second pass forward leaves it at that).
        """
        recipe, spec = self.recipe, self.spec
        scored = self._rows_scored()
        both = (spec.output == "text" or spec.output == "scores") + bool(spec.critic(recipe))
        layers = self.memory.dims.num_layers
        back = (layers - self.memory.beside.first) / layers
        rows = math.ceil(self._count(step_shape(recipe, self.settings.micro_batch_tokens)))
        update = spec.epochs(recipe) * rows * both * (1 + back) + spec.entropy_passes(recipe) * scored
        if not spec.samples:
            return {"update": update}
        prompts, each = recipe.training.prompts_per_step, recipe.generation.num_generations
        shares = [share for _, share, _ in self._roles()]
        return {
            "rollout": self._sampling_passes(prompts, prompts * each) + self._judges() * scored,
            "score": sum(math.ceil(share * scored) for share in shares),
            "update": update,
        }

    def _sampling_passes(self, prompts: int, count: int) -> int:
        """Return the passes over the layers in which so many completions of so many prompts are written."""
        prompt, length = sampled_lengths(self.recipe).values()
        rows = min(count, rollout_rows(self.recipe, self.settings.rollout_batch_size))
        at_once = max(1, self.settings.micro_batch_tokens // prompt)
        return math.ceil(prompts / at_once) + math.ceil(count / rows) * (length - 1)

    def _rows_scored(self) -> int:
        return math.ceil(self._count(step_shape(self.recipe, self.settings.score_batch_tokens)))

    def _judges(self) -> int:
        return sum(reward.function == REWARD_ADAPTER for reward in self.recipe.rewards)

    def _with_gathers(self, seconds: float, phase: str) -> float:
        """Return the seconds of a phase whose layers are gathered while those before them compute."""
        return max(seconds, self.gathers()[phase] * self.gathering) if self.gathering else seconds

    def rollout(self) -> float:
        """Return the seconds of a step's completions, with the rewards that are adapters on the base."""
        recipe = self.recipe
        prompts, each = recipe.training.prompts_per_step, recipe.generation.num_generations
        judged = sum(self._scored(1, 1.0, language=False) for _ in range(self._judges()))
        return self._with_gathers(self.completions(prompts, prompts * each) + judged, "rollout")

    def completions(self, prompts: int, count: int) -> float:
        """Return the seconds in which so many completions of so many prompts are written."""
        recipe, settings = self.recipe, self.settings
        prompt, length = sampled_lengths(recipe).values()
        rows = min(count, rollout_rows(recipe, settings.rollout_batch_size))
        at_once = max(1, settings.micro_batch_tokens // prompt)
        fed = prompts_shape(prompt, min(prompts, at_once) * prompt)
        seconds = prompts / min(prompts, at_once) * self.passes.prefill(fed).started()
        if settings.quantization == "nf4" and settings.rollout_weights == "dequantized":
            seconds += self.passes.copy().started()
        return seconds + count / rows * self._decoding(rows, prompt, length)

    def _decoding(self, rows: int, prompt: int, length: int) -> float:
        """Return the seconds of all tokens but the first, which the prompt gives, of so many rows side by side."""
        graphs = decodes_by_graphs(self.memory)
        room = slot_room(prompt, length)
        ahead = LOOK if graphs else 0
        seconds, place, end = 0.0, prompt, prompt + length - 1
        while place < end:
            seen = seen_room(place + ahead, room)
            count = max(1, min(end, seen - ahead + 1) - place)  # tokens that see as much
            place += count
            token = self.passes.token(rows, seen)
            if graphs:
                again = 0 if self.settings.keep_graphs else CAPTURES
                seconds += count * (token.replayed() + WAIT / LOOK) + again * token.kernels * self.rates.start
            else:
                more = 1 if self.memory.on_cpu else STARTED_ONE_BY_ONE
                seconds += count * (token.seconds + more * token.kernels * self.rates.start + WAIT)
        return seconds

    def score(self) -> float:
        """Return the seconds of passes without gradients over what was sampled."""
        return self._with_gathers(sum(self._scored(*role) for role in self._roles()), "score")

    def _roles(self) -> list[tuple[int, float, bool]]:
        """Return of each role that scores its adapters, its share of completions, and whether it gives log-probs."""
        recipe, spec = self.recipe, self.spec
        roles: list[tuple[int, float, bool]] = []
        if spec.reference:
            roles.append((reference_adapters(recipe), spec.compared(recipe), True))
        if spec.scores_policy:
            roles.append((1, 1.0, True))
        if spec.critic(recipe):
            roles.append((self.memory.critic_adapters(), 1.0, False))
        return roles

    def _scored(self, adapters: int, share: float, language: bool = True) -> float:
        shape = step_shape(self.recipe, self.settings.score_batch_tokens)
        return share * self._count(shape) * self.passes.score(shape, adapters, language).started()

    def _count(self, shape: PackedShape) -> float:
        """Return how many packed rows of this shape a step has; the last one may be a part of one."""
        step = self.recipe.training.prompts_per_step * self.spec.completions(self.recipe)
        return max(1.0, step / shape.rows)

    def update(self) -> float:
        """Return the seconds of all passes with gradients and optimizer steps of a step."""
        return self.gradients() + self.optimizer()

    def gradients(self) -> float:
        """Return the seconds of all passes with gradients of a step, which its completions share evenly."""
        recipe, spec = self.recipe, self.spec
        shape = step_shape(recipe, self.settings.micro_batch_tokens)
        critic = spec.critic(recipe)
        each = partial(self.passes.update, shape)
        seconds = each(1, spec.output == "text").started()
        before = spec.entropy_passes(recipe) * self._scored(1, 1.0) if spec.entropy_passes(recipe) else 0.0
        if critic:
            seconds += each(self.memory.critic_adapters(), False).started()
        return self._with_gathers(spec.epochs(recipe) * self._count(shape) * seconds + before, "update")

    def optimizer(self) -> float:
        """Return the seconds of the optimizer steps of a step, with what makes a reference follow."""
        steps = self.spec.updates(self.recipe)
        follows = self.spec.follows(self.recipe)
        mixed = steps / follows.steps * self.passes.mixing().started() if follows else 0.0
        return mixed + steps * self.passes.optimizer().started()

    def evaluation(self) -> float:
        """Return the seconds of the held-out examples once."""
        recipe = self.recipe
        held = recipe.data.eval_size
        if not held:
            return 0.0
        if self.spec.samples or recipe.rewards:
            count = held * recipe.evaluation.num_samples
            return max(self.completions(held, count), self._sampling_passes(held, count) * self.gathering)
        shape = step_shape(recipe, self.settings.score_batch_tokens)
        rows = held / recipe.training.prompts_per_step * self._count(shape)
        seconds = rows * self.passes.score(shape, 1, self.spec.output == "text").started()
        return max(seconds, math.ceil(rows) * self.gathering)


def evaluations_of(recipe: Recipe, steps: int) -> int:
    """Return how often a run of so many steps evaluates: before, after, and every `evaluation.steps` between."""
    if not recipe.data.eval_size:
        return 0
    every = recipe.evaluation.steps
    return 2 + (max(0, steps - 1) // every if every else 0)  # that of the last step is the one after


def run_time(
    dims: ModelDimensions, recipe: Recipe, settings: Settings, device: Device, ring: Ring | None = None
) -> RunTime | None:
    """Return the predicted time of a run.

    None where nobody tells how fast the device is, how experts are routed, or how fast the server that samples is.
    """
    if not has_terms(dims) or (recipe.generation.engine in SERVERS and samples_completions(recipe)):
        return None
    known = {case: device_rates(device, case) for case in ("expected", "best", "worst")}
    steps = {case: StepTime(dims, recipe, settings, device, one, ring) for case, one in known.items() if one}
    if len(steps) < len(known):
        return None
    phases = steps["expected"].phases()
    best, worst = steps["best"].step(), steps["worst"].step()
    evaluation = steps["expected"].evaluation()
    training = recipe.training
    count = training.max_steps if training.num_train_epochs is None else None
    step = sum(phases.values())
    run, ends, times = None, None, None
    if count is not None:
        times = evaluations_of(recipe, count)
        run = count * step + times * evaluation
        low, high = (steps[case].evaluation() for case in ("best", "worst"))
        ends = (count * best + times * low, count * worst + times * high)
    return RunTime(phases, step, (best, worst), evaluation, count, run, ends, times)
