"""The ladder: what shrinks when the device's memory runs out, and how it grows again.

Every piece of work that allocates on the device runs through one ladder a run. Sizes are halved first; then what costs
time is given up (activations are recomputed, the 16-bit copy of a rollout's weights goes, embeddings move to host
memory). Nothing of it changes what is computed beyond rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lowmem_rlhf.engine.passes import BatchLimits
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.hardware.memory import is_out_of_memory, retried
from lowmem_rlhf.planning.memory.resident import Settings
from lowmem_rlhf.processes.world import current

T = TypeVar("T")

LEAST_TOKENS = 64  # a micro-batch never gets smaller; it holds one completion then
PATIENCE = 10  # steps without a failure after which a size is doubled again; each failure after that doubles them
MOST_PATIENCE = 640
SIZES = {"rollout": "rollout_batch_size", "scoring": "score_batch_tokens", "update": "micro_batch_tokens"}  # by phase


@dataclass(frozen=True)
class RolloutLimits:
    """What bounds a rollout's memory.

    Attributes:
        rows: completions at once.
        prefill_tokens: prompt tokens in one prefill.
        tile: rows in one logits tile.
        copy_weights: whether an engine may hold a 16-bit copy of quantized weights, as the plan may have it.
        keep_graphs: whether an engine may keep its graphs, and the caches that they read, until the next rollout.
    """

    rows: int
    prefill_tokens: int
    tile: int
    copy_weights: bool = True
    keep_graphs: bool = False


@dataclass(frozen=True)
class Saving:
    """Something that saves memory at a price, taken once the sizes are at their least.

    Attributes:
        phases: of a step in which it helps.
        key: of the plan's settings.
        value: that the setting gets.
        take: does it.
    """

    phases: frozenset[str]
    key: str
    value: Any
    take: Callable[[], None]


class Ladder:
    """The sizes that shrink, made once from the settings of a plan and shared by all who work on one base.

    Work is given the limits of its turn. When the device's memory runs out the work is done once more as it is, with
    the device's cache emptied; if it fails again, or has failed in the last `PATIENCE` steps, the next rung is taken,
    and so on, all of which is said. Work must leave nothing behind when it fails. Whoever comes next starts with the
    smaller size. After `PATIENCE` steps without a failure a size is doubled again, up to the plan's. Among several
    processes all begin the work once more, and the one whose memory ran out goes on with less.

    Args:
        device: whose memory it is.
        rollout_batch_size: completions sampled at once.
        micro_batch_tokens: tokens of a micro-batch with gradients; a prefill pass of a rollout has as many at most.
        score_batch_tokens: tokens of a micro-batch without gradients.
        logits_tile_tokens: positions of a logits tile, which does not shrink.
        temperature: at which the log-probs of passes are taken.
        keep_graphs: whether an engine may keep graphs from one rollout to the next.

    Attributes:
        savings: what is taken when sizes are at their least, in this order.
        explain: given a phase, returns what a run says about it that ends here: what it takes, what there is and what
            would fit.
        failures: how often memory ran out.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rollout_batch_size: int,
        micro_batch_tokens: int,
        score_batch_tokens: int,
        logits_tile_tokens: int,
        temperature: float = 1.0,
        keep_graphs: bool = False,
    ) -> None:
        self.device, self.temperature, self.tile = device, temperature, logits_tile_tokens
        self.prefill_tokens = micro_batch_tokens
        self.keep_graphs = keep_graphs
        self.rollout_batch_size = rollout_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.score_batch_tokens = score_batch_tokens
        self.savings: list[Saving] = []
        self.explain: Callable[[str], str] = lambda phase: _REMEDY
        self.failures = 0
        self._planned = {key: getattr(self, key) for key in SIZES.values()}
        self._taken: dict[str, Any] = {}  # settings of the savings that were taken
        self._quiet, self._patience = 0, PATIENCE  # steps since the last failure, and how many it takes to grow
        self._grew = False  # and has not failed since
        self._steps = 0  # that finished
        self._repeated: dict[str, int] = {}  # by phase: the step in which it was last tried once more as it was

    @classmethod
    def of(cls, settings: Settings, device: torch.device, temperature: float = 1.0) -> "Ladder":
        """Return the ladder of a plan's settings."""
        return cls(
            device,
            rollout_batch_size=settings.rollout_batch_size,
            micro_batch_tokens=settings.micro_batch_tokens,
            score_batch_tokens=settings.score_batch_tokens,
            logits_tile_tokens=settings.logits_tile_tokens,
            temperature=temperature,
            keep_graphs=settings.keep_graphs,
        )

    @property
    def changed(self) -> dict[str, Any]:
        """The plan's settings that are another now, with their values."""
        sizes = {key: getattr(self, key) for key, planned in self._planned.items() if getattr(self, key) != planned}
        return {**sizes, **self._taken}

    def rollout(self, work: Callable[[RolloutLimits], T], say: Callable[[str], None]) -> T:
        """Sample completions, fewer at once when memory runs out.

        Args:
            say: is given what was made smaller.

        Raises:
            RunError: not even one completion at a time fits.
        """

        def limits(rows: int) -> RolloutLimits:
            copies = self._taken.get("rollout_weights") != "quantized"
            keep = self.keep_graphs and "keep_graphs" not in self._taken
            return RolloutLimits(rows, self.prefill_tokens, self.tile, copies, keep)

        return self.run("rollout", lambda rows: work(limits(rows)), say)

    def update(self, work: Callable[[BatchLimits], T], say: Callable[[str], None]) -> T:
        """Run passes with gradients, cut into smaller micro-batches when memory runs out.

        Args:
            say: is given what was made smaller.

        Raises:
            RunError: not even the smallest micro-batch fits.
        """
        return self.run("update", lambda tokens: work(self._limits(tokens)), say)

    def score(self, work: Callable[[BatchLimits], T], say: Callable[[str], None]) -> T:
        """Run passes without gradients; as `update`, with the larger micro-batches that such passes take."""
        return self.run("scoring", lambda tokens: work(self._limits(tokens)), say)

    def _limits(self, tokens: int) -> BatchLimits:
        return BatchLimits(self.temperature, tokens, self.tile)

    def run(self, phase: str, work: Callable[[int], T], say: Callable[[str], None]) -> T:
        """Run ``work(size)`` with the size of this phase, and keep the size that fitted.

        Args:
            phase: ``rollout``, ``scoring`` or ``update``.
            say: is given what was made smaller.

        Raises:
            RunError: not even the least size fits.
        """
        key = SIZES[phase]
        return self.survive(phase, lambda: work(getattr(self, key)), say)

    def survive(
        self,
        phase: str | Callable[[], str],
        work: Callable[[], T],
        say: Callable[[str], None],
        sizes: bool = True,
    ) -> T:
        """Run work that allocates on the device; when memory runs out, take the next rung and run it again.

        Args:
            phase: one of `SIZES` or the name of work without a size of its own; or what returns the phase that failed.
            work: must leave nothing behind when it fails.
            say: is given what was made smaller.
            sizes: whether it takes less with smaller sizes; else it is only tried once more.

        Raises:
            RunError: nothing is left to make smaller, and it does not fit.
        """

        def name() -> str:
            return phase if isinstance(phase, str) else phase()

        def smaller() -> str:
            self.failures += 1
            if self._may_repeat(name()):
                return f"the device's memory ran out in the {name()} phase; trying once more"
            return self.smaller(name()) if sizes else ""

        try:
            return retried(current().attempt(work, is_out_of_memory), smaller, self.device, say)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(self.ran_out(name(), sizes)) from error

    def ran_out(self, phase: str, sizes: bool = False) -> str:
        """Return the sentence that ends a phase whose memory ran out, with what helps; sizes as for `survive`."""
        keys = [SIZES[phase]] if phase in SIZES else list(SIZES.values())
        shape = ", ".join(f"hardware.{key}={getattr(self, key)}" for key in keys)
        even = f" even with {shape}" if sizes else ""
        try:
            helps = self.explain(phase)
        except Exception:  # a plan that cannot be made must not hide what has happened
            helps = _REMEDY
        return f"the device's memory ran out in the {phase} phase{even}; {helps}"

    def lower(self, settings: dict[str, Any]) -> None:
        """Begin with what an earlier part of the run has come down to (see `changed`)."""
        for key in SIZES.values():
            if key in settings:
                setattr(self, key, min(getattr(self, key), settings[key]))
        for saving in [one for one in self.savings if settings.get(one.key) == one.value]:
            self._take(saving)

    def _take(self, saving: Saving) -> None:
        self.savings.remove(saving)
        saving.take()
        self._taken[saving.key] = saving.value

    def _may_repeat(self, phase: str) -> bool:
        """Whether a phase is tried once more as it is: where that did not happen in the steps before.

        The device's cache has been emptied by then, and another program may have taken the memory for a moment only.
        """
        if phase in self._repeated and self._steps - self._repeated[phase] < PATIENCE:
            return False
        self._repeated[phase] = self._steps
        return True

    def smaller(self, phase: str) -> str:
        """Take the next rung for a phase; return what was done, an empty text where nothing is left.

        Work that has no size of its own (a whole step, say) may fail of anything, so all sizes shrink for it.
        """
        if self._grew:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        self._quiet, self._grew = 0, False
        if halved := self._halved(phase):
            before, now = (", ".join(parts) for parts in zip(*halved, strict=True))
            return f"the device's memory ran out with {before}; going on with {now}"
        saving = next((one for one in self.savings if phase in one.phases or phase not in SIZES), None)
        if saving is None:
            return ""
        self._take(saving)
        value = str(saving.value).lower() if isinstance(saving.value, bool) else saving.value
        return f"the device's memory ran out in the {phase} phase; going on with hardware.{saving.key}={value}"

    def _halved(self, phase: str) -> list[tuple[str, str]]:
        """Halve the size of a phase, or all sizes; return what there was, and what there is now."""
        changed = []
        for key in [SIZES[phase]] if phase in SIZES else SIZES.values():
            before, least = getattr(self, key), 1 if key == "rollout_batch_size" else LEAST_TOKENS
            if before > least:
                setattr(self, key, max(least, before // 2))
                changed.append((f"hardware.{key}={before}", str(getattr(self, key))))
        return changed

    def step_finished(self) -> list[str]:
        """Count a step without a failure; return a sentence where something has grown again."""
        self._quiet += 1
        self._steps += 1
        small = {key: planned for key, planned in self._planned.items() if getattr(self, key) < planned}
        if not small or self._quiet < self._patience:
            return []
        self._quiet, self._grew = 0, True
        for key, planned in small.items():
            setattr(self, key, min(planned, 2 * getattr(self, key)))
        grown = ", ".join(f"hardware.{key}={getattr(self, key)}" for key in small)
        return [f"memory has sufficed for {self._patience} steps; going on with {grown}"]


_REMEDY = (
    "close other programs that use it, shorten generation.max_completion_length, take a smaller model or "
    "hardware.quantization=nf4"
)
