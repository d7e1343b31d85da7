"""What all training shares: steps, held-out evaluation before, after and between, checkpoints, what may go wrong.

A kind of training fills in one step and the evaluation (`online` for what samples and scores, `supervised` for what
learns from given texts). All randomness is a function of (seed, step), so a resumed run continues as the uninterrupted
one would have.
"""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import set_seed

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.checksum import DRIFTED, base_checksum
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.roles import CRITIC, REFERENCE
from lowmem_rlhf.errors import RunError, UserError, one_line
from lowmem_rlhf.hardware.gauges import step_gauge
from lowmem_rlhf.hardware.memory import clock, device_failure, is_out_of_memory, peak_bytes, reset_peak
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.processes.world import PeerLostError, begun, together
from lowmem_rlhf.progress import Progress, current, message, shown_by
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.process_state import random_states, set_random_states
from lowmem_rlhf.rewards.time_limit import end_process, stuck_calls_end_with
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import AFTER, BEFORE, DURING, metrics_of
from lowmem_rlhf.stopping import check_stop
from lowmem_rlhf.training.checkpoint import load_checkpoint, save_checkpoint
from lowmem_rlhf.training.health import HealthWatch
from lowmem_rlhf.training.held_out import HeldOut
from lowmem_rlhf.training.learning import LostTokens, no_gradient, parts_of, sums, unchanged, warm_up_remark
from lowmem_rlhf.training.memory import explain_shortage, savings_of
from lowmem_rlhf.training.optimizer import Optimizer, OwnRate
from lowmem_rlhf.training.relayed import RelayedMessages
from lowmem_rlhf.training.trackers import Trackers
from lowmem_rlhf.training.trained_state import StateKeeper

LADDER = "ladder"  # the settings that memory has changed, in a checkpoint's counters
PHASES = {"score": "scoring"}  # of the plan, by the part of a step where they have other names


@dataclass(frozen=True)
class StepOutput:
    """What one training step did; ``for step in trainer`` gives one for every finished step.

    Attributes:
        metrics: the step's row of metrics.jsonl: ``step``, ``loss``, ``grad_norm``, ``learning_rate``, ``reward/mean``,
            ``time/step`` (seconds), ``memory/peak_bytes`` and more; None is a number that there is none of. Of a step
            that was evaluated also ``eval/NAME``.
        learned_tokens: tokens whose loss had a gradient in this step.
        samples: the step's rows of samples.jsonl, a completion each; empty where nothing is sampled.
        rollout: the completions with their scores and advantages; None where nothing is sampled.
    """

    metrics: dict[str, Any]
    learned_tokens: int
    samples: Sequence[dict[str, Any]] = field(default_factory=tuple)
    rollout: Rollout | None = None


def own_rate(recipe: Recipe, base: SharedBase) -> OwnRate | None:
    """Return what the critic's own parameters learn at, where the recipe says so."""
    rate, norm = recipe.spec.critic_rate(recipe)
    if CRITIC not in base.heads or (rate is None and norm is None):
        return None
    names, training = frozenset(base.own_trainable(CRITIC)), recipe.training
    return OwnRate(names, rate or training.learning_rate, norm or training.max_grad_norm)


@dataclass(frozen=True)
class _Finished:
    """A step that is done and not yet on record.

    Attributes:
        step: its number.
        output: with all metrics.
        counters: of a checkpoint after it.
    """

    step: int
    output: StepOutput
    counters: dict[str, Any]


class Loop(ABC):
    """Training on a SharedBase.

    Args:
        recipe, plan: what to do and the chosen settings.
        base: the shared base with the adapters that train.
        run: where everything is written.
        updates: optimizer steps of each step, for the schedule.
        ladder: the sizes that shrink when memory runs out; None: made from the plan's.
    """

    nothing_learned = "nothing was learned: no token of the run had anything to teach"
    base_is_always_checked = False  # that it is the same at the end, whatever hardware.check says

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        run: RunDirectory,
        updates: int = 1,
        ladder: Ladder | None = None,
    ) -> None:
        self.recipe, self.plan, self.base, self.run = recipe, plan, base, run
        settings = plan.settings
        self.ladder = ladder or Ladder.of(settings, base.device, recipe.generation.temperature)
        self.ladder.savings = savings_of(base, settings)
        self.ladder.explain = explain_shortage(recipe, plan, self.ladder)
        self.checks_base = recipe.hardware.check == "always" or self.base_is_always_checked
        self.world = begun()
        self.trackers = Trackers(base.device, recipe, run)
        set_seed(recipe.training.seed)
        base.set_gradient_checkpointing(settings.gradient_checkpointing, settings.offload_checkpoints)
        self.optimizer = self.ladder.survive(
            "optimizer",
            lambda: Optimizer(
                base.trainable(),
                recipe.training,
                settings.optim,
                recipe.training.max_steps * updates,
                base.device,
                scale_loss=base.dtype == torch.float16,
                own=own_rate(recipe, base),
            ),
            message,
        )
        self.health = HealthWatch(base.head.vocabulary, recipe.training.max_grad_norm)
        self.lost = LostTokens(recipe.training, self.optimizer)
        self.step = 0
        self.began_at = 0  # the step that this process began after
        self.held_out_results = HeldOut(recipe, run)
        self.learned_tokens = 0  # tokens that taught something, over all steps
        self._keeper = StateKeeper(self.optimizer, base.device, run.path, base.following())
        self._finished: _Finished | None = None
        self._settings: dict[str, Any] = {}  # that the ladder has changed, as plan.json has them
        self._times: dict[str, float] = {}
        self._gauge = step_gauge(base.device)
        self._part = "training"  # of a step, that runs now
        self._begun = False  # a step has begun that is not on record: weights and counters may be neither's
        self._ending = False  # another thread ends the process

    @abstractmethod
    def one_step(self, progress: Progress) -> StepOutput:
        """Take the step after ``self.step``; its optimizer steps go through ``self.optimizer``."""

    @abstractmethod
    def evaluate(self, when: str, progress: Progress) -> dict[str, Any]:
        """Return held-out results by name; empty if nothing is held out.

        ``intervals`` (``[low, high]`` by name) and ``headline``, the name of the measure that the task has, may be
        among them (see `run.held_out`).

        Args:
            when: ``before``, ``after``, or ``of step N``.
        """

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides weights, optimizer and step; fit for JSON."""
        return {}

    def why_nothing(self) -> str:
        """Return what a run says in which no token taught anything."""
        return self.nothing_learned

    def last_words(self) -> list[str]:
        """Return what is said once all steps are done, a sentence each."""
        return []

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Go on from what `state` gave."""

    def resume(self) -> None:
        """Continue from the run's latest checkpoint; a run that has none yet starts over."""
        latest = self.run.latest_checkpoint()
        if latest is None:
            message("there is no checkpoint yet: the run starts over")
            return
        message(f"going on after step {latest[0]}")
        self.step, counters = self.ladder.survive(
            "checkpoint", lambda: load_checkpoint(latest[1], self.base, self.optimizer, self._in_checkpoints()), message
        )
        try:
            self._load_counters(counters)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # of a checkpoint without hashes
            raise UserError(f"checkpoint {latest[1]} has other counters ({error}); delete it") from error

    def _counters(self, learned_tokens: int) -> dict[str, Any]:
        watches = {"health": self.health.state(), "lost": self.lost.state()}
        counters = {"learned_tokens": learned_tokens, **watches, **self.state()}
        return {**counters, LADDER: changed} if (changed := self.ladder.changed) else counters

    def _load_counters(self, counters: dict[str, Any]) -> None:
        counters = copy.deepcopy(counters)
        self.ladder.lower(counters.pop(LADDER, {}))
        self.learned_tokens = counters.pop("learned_tokens")
        self.health.load_state(counters.pop("health", {}))  # older checkpoints have none
        self.lost.load_state(counters.pop("lost", {}))
        self.load_state(counters)

    def train(self, progress: Progress, on_step: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Run all steps and both evaluations; return evaluation.json's content.

        Args:
            progress: where the work reports.
            on_step: is given the metrics of every finished step.

        Raises:
            RunError: a reward function failed, memory ran out for good, or nothing was learned.
            KeyboardInterrupt: the user stopped it. A note on this error and on any other says which step is kept,
                the last finished one; what the next one had begun is taken back.
        """
        self.run.lock()
        try:
            with self._in_sentences(), closing(self._steps(progress)) as steps:
                for finished in steps:
                    if on_step:
                        on_step(finished.metrics)
        except BaseException as error:
            self._leave(error)
            self._note(error, progress)
            raise
        finally:
            self.run.unlock()
        return self.run.evaluation()

    def steps(self, progress: Progress) -> Generator[StepOutput, None, None]:
        """Yield every finished step with all its metrics; both evaluations and the end of the run are a part of it.

        Whoever stops early leaves a checkpoint of the last finished step, from which `resume` goes on.

        Raises:
            RunError: as for `train`.
        """
        self.run.lock()
        try:
            with self._in_sentences():
                yield from self._steps(progress)
        except BaseException as error:
            self._leave(error)
            self._note(error, progress)
            raise
        finally:
            self.run.unlock()

    @contextmanager
    def _in_sentences(self) -> Iterator[None]:
        """Turn what a device, memory or autograd ends a run with into one sentence."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self.world.is_lost(error):
                raise PeerLostError(self.world.lost(error)) from error
            sentence = no_gradient(error) or device_failure(error, self._part, self.step + 1)
            if sentence is None and is_out_of_memory(error):
                sentence = self.ladder.ran_out(self._part)
            if sentence is None:
                raise
            raise RunError(sentence) from error

    def _leave(self, error: BaseException) -> None:
        """Let no other process wait for this one, unless they end here as well."""
        if not isinstance(error, GeneratorExit) and not getattr(error, "known_to_all", False):
            self.world.leave()

    def _note(self, error: BaseException, progress: Progress) -> None:
        """Save what is finished and say so on an error; where nobody will see that, only what could not be kept."""
        note = self._keep()
        if self.run.writes:
            error.add_note(note)
        with suppress(Exception):  # the device may be gone; what is left to be taken back is before the next step
            self._settle()
        if isinstance(error, GeneratorExit) and "lost" in note:  # the user's loop has ended early
            progress.message(note)

    def _steps(self, progress: Progress) -> Generator[StepOutput, None, None]:
        progress = RelayedMessages(progress) if self.world.several else progress
        self.trackers.begin(self.step)
        try:
            yield from self._evaluated_steps(progress)
        finally:
            self.trackers.end()

    def _evaluated_steps(self, progress: Progress) -> Generator[StepOutput, None, None]:
        held_out, self.began_at = self.held_out_results, self.step
        held_out.begin()
        if self._keeper.step != self.step:
            self._keeper.keep(self.step, self._counters(self.learned_tokens))
        if BEFORE not in held_out.results and not self.step:  # a resumed policy is not what there was before
            self._evaluate_end(BEFORE, progress)
        checksum = base_checksum(self.base) if self.checks_base else ""
        if self.step == 0 and (remark := warm_up_remark(self.recipe.training, self.optimizer.total_steps)):
            progress.message(remark)
        if self.step == 0 and held_out.remark:
            progress.message(held_out.remark)
        self._evaluate_during(progress)  # of the step gone on from, where a stop came before the end of it
        while self.step < self.recipe.training.max_steps and not held_out.ends(self.step):
            finished = self._train_step(progress)
            if self.step % self.recipe.training.save_steps == 0:
                self._check_alike()
                self._save()
            yield replace(finished, metrics={**finished.metrics, **self._evaluate_during(progress)})
        if sentence := held_out.ends(self.step):
            progress.message(sentence)
        if self.recipe.training.max_steps and not self.learned_tokens:
            raise self._in_all(self.lost.why() or self.why_nothing())
        if checksum and base_checksum(self.base) != checksum:
            raise RunError(DRIFTED)
        self._save()
        self._evaluate_end(AFTER, progress)
        if self.run.writes:
            self._save_adapter()
        for sentence in filter(None, (held_out.summary(), self.health.summary())):
            progress.message(sentence)

    def _save_adapter(self) -> None:
        parameters = self._keeper.state().parameters
        with self.run.new_adapter() as folder:
            self.base.save_adapter(folder, parameters=parameters)
            for role in self._others():
                self.base.save_adapter(folder / role, role, parameters)

    def _others(self) -> list[str]:
        """Return the roles that train besides the policy."""
        return [CRITIC] if CRITIC in self.base.heads else []

    def _in_checkpoints(self) -> list[str]:
        """Return the roles besides the policy without which a run cannot go on."""
        return [*self._others(), *([REFERENCE] if self.base.follows else [])]

    def _record_again(self) -> None:
        if self._finished is None:
            return
        try:
            self._record(again=True)
        except BaseException:  # a checkpoint of the step before proves the rows up to it
            self.run.rewind(self.step)
            raise

    def _save(self) -> None:
        latest = self.run.latest_checkpoint()
        if self.run.writes and self.step and (latest is None or latest[0] < self.step):
            self.run.unhealthy_from = self.health.first_serious
            roles = self._in_checkpoints()
            save_checkpoint(self.run, self.base, self._keeper.state(), roles, self.health.healthy)

    def _keep(self) -> str:
        """Save the last finished step, whatever the next has done to the weights; return what is on the disk."""
        lost_as = ""
        # where a row cannot be written, the step before may still be saved
        for save in (self._record_again, self._save):
            try:
                save()
            except BaseException as error:  # what ended the run is told, and not this
                lost_as = lost_as or f", as they could not be saved ({one_line(error)})"
        return self.what_is_kept() + lost_as

    def _settle(self) -> None:
        """Be as at the end of the last finished step, for whoever goes on with this object."""
        self._finished = None  # where it could not be put on record
        self._take_back()

    def _end_stuck(self, message: str) -> None:
        """End the process while a call of a user's function stands in code that nothing interrupts; save before."""
        self._ending = True
        with suppress(BaseException):
            message = f"{message}; {self._keep()}"
        end_process(message)

    def what_is_kept(self) -> str:
        """Return which step is on the disk, and which ones are not."""
        latest = self.run.latest_checkpoint()
        saved = latest[0] if latest else 0
        note = f"step {saved} is kept, --resume goes on from it" if latest else "no step is kept, --resume starts over"
        last = self.step if self._finished is None else self._finished.step
        lost = f"step {last} is" if last == saved + 1 else f"steps {saved + 1} to {last} are"
        return f"{note}; {lost} lost" if saved < last else note

    def _evaluate(self, when: str, progress: Progress) -> dict[str, Any]:
        """Evaluate; whatever it draws from the generators of random numbers, the next step finds them as they were."""
        states = random_states()
        try:
            with stuck_calls_end_with(self._end_stuck), self._with_others(progress):
                return self.ladder.survive("evaluation", lambda: self.evaluate(when, progress), progress.message)
        finally:
            set_random_states(states)

    def _evaluate_end(self, when: str, progress: Progress) -> None:
        """Evaluate before or after all steps, unless that is the evaluation of the last step."""
        held_out = self.held_out_results
        for sentence in self.last_words() if when == AFTER else ():
            progress.message(sentence)
        there = held_out.row(self.step) if when == AFTER else None
        if results := there or self._evaluate(when, progress):
            if when == AFTER:
                held_out.end(results, self.step)
            else:
                held_out.add(when, results, self.step)
                progress.message(held_out.shown_before())
            held_out.write()
            if there is None:
                self.trackers.log(metrics_of(held_out.results[when]), self.step)

    def _evaluate_during(self, progress: Progress) -> dict[str, Any]:
        """Evaluate after the last finished step if it is one to evaluate; return what its metrics get of that.

        The step is on record by then. The results are on the disk after their checkpoint, and so never without it.
        """
        held_out = self.held_out_results
        if not held_out.due(self.step) or not (results := self._evaluate(f"of step {self.step}", progress)):
            return {}
        if held_out.add(DURING, results, self.step):
            self._save()
        held_out.write()
        found = metrics_of(held_out.row(self.step) or {})
        self.trackers.log(found, self.step)
        progress.message(held_out.shown(self.step))
        return found

    @contextmanager
    def _with_others(self, progress: Progress) -> Iterator[None]:
        """Share out the work inside the block; what other processes say of it is shown by the first."""
        if not isinstance(progress, RelayedMessages):
            yield
            return
        with together(), shown_by(progress):
            yield
            progress.tell(self.world)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure a part of the step."""
        self._part = PHASES.get(name, name)
        current().phase(name)
        began = clock(self.base.device)
        yield
        self._times[name] = clock(self.base.device) - began

    def _check_alike(self) -> None:
        """Check that all processes have the same adapters.

        Raises:
            RunError: they have not.
        """
        if self.world.several and len({repr(one) for one in self.world.gather(sums(parts_of(self.base)))}) > 1:
            raise self._in_all(
                f"after step {self.step} the processes do not have the same adapters, so something in the run (a "
                "reward or a loss of your own?) draws from other random numbers in each; the last checkpoint is whole"
            )

    def _in_all(self, sentence: str) -> RunError:
        """Return an error that every process has at this place; the first one says it."""
        error = RunError(sentence)
        error.known_to_all, error.said_elsewhere = True, self.world.rank > 0
        return error

    def _train_step(self, progress: Progress) -> StepOutput:
        """Take one step, once more from its beginning where memory runs out, and put it on record."""
        learning_rate, skipped = self.optimizer.learning_rate, self.optimizer.skipped
        effective = self.optimizer.effective
        before = None if self.learned_tokens else sums(parts_of(self.base))
        states = random_states()  # of generators that no work of ours draws from, but a user's function may

        def attempt() -> StepOutput:
            self._check_stop()
            if self._begun:  # not where the try before failed: its tensors were still held there
                self._take_back()
                set_random_states(states)
            self._begun, self._part = True, "training"
            try:
                return self._attempt(progress)
            finally:
                self._part = "optimizer" if self.optimizer.stepping else self._part

        with stuck_calls_end_with(self._end_stuck), self._with_others(progress):
            output = self.ladder.survive(lambda: self._part, attempt, progress.message)
        self._check_stop()
        learned = 0
        # a warm-up begins with a learning rate of zero; a step with a number that is not finite is left out
        if output.learned_tokens and self.optimizer.effective > effective:
            if before is not None and (sentence := unchanged(before, sums(parts_of(self.base)), output.metrics)):
                raise self._in_all(sentence)
            learned = output.learned_tokens
        else:
            self.lost.add(output.learned_tokens, left_out=self.optimizer.skipped > skipped)
        metrics = {
            "step": self.step + 1,
            **output.metrics,
            "learning_rate": learning_rate,
            "loss_scale/skipped_steps": self.optimizer.skipped,
            **{f"time/{name}": seconds for name, seconds in self._times.items()},
            "time/step": sum(self._times.values()),
            "memory/peak_bytes": peak_bytes(self.base.device),
            **self._gauge(),
        }
        if self.ladder.failures:
            metrics["memory/retries"] = self.ladder.failures
        for sentence in [*self.optimizer.say(), *self.health.observe(metrics), *self.ladder.step_finished()]:
            progress.message(sentence)
        output = replace(output, metrics=metrics)
        self._finished = _Finished(self.step + 1, output, self._counters(self.learned_tokens + learned))
        self._record()
        self.trackers.log(metrics, self.step)
        return output

    def _check_stop(self) -> None:
        check_stop()
        while self._ending:  # by another thread, which saves meanwhile
            time.sleep(1)

    def _attempt(self, progress: Progress) -> StepOutput:
        reset_peak(self.base.device)
        self._times = {}
        self.optimizer.at_step = self.step + 1
        taken = self.optimizer.taken
        output = self.one_step(progress)
        if self.optimizer.taken != taken:
            self.optimizer.check_weights()
        return output

    def _record(self, again: bool = False) -> None:
        """Write the rows of the step that is done, and keep its state: from then on it is finished.

        Args:
            again: it may have been done in part.
        """
        assert self._finished is not None
        done = self._finished
        if again:
            self.run.rewind(done.step - 1)
        self.run.log_metrics(done.output.metrics)
        self.run.log_samples(done.step, done.output.samples)
        if (changed := self.ladder.changed) != self._settings:
            self.run.change_settings(changed, f"changed in step {done.step}, when memory ran out or was free again")
            self._settings = changed
        self._keeper.keep(done.step, done.counters)
        self.step, self.learned_tokens = done.step, done.counters["learned_tokens"]
        self._finished, self._begun = None, False

    def _take_back(self) -> None:
        """Be as at the end of the last finished step."""
        if not self._begun:
            return
        self._load_counters(self._keeper.put_back().counters)
        self.optimizer.stepping = False
        self.base.adapters_changed()
        self._begun = False
