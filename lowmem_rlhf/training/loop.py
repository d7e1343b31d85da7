"""What all training shares: steps, held-out evaluation before and after, checkpoints, and what may go wrong.

A kind of training fills in one step and the evaluation (`online` for what samples and scores, `supervised` for what
learns from given texts). All randomness is a function of (seed, step), so a resumed run continues as the uninterrupted
one would have.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.roles import CRITIC, POLICY
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.hardware.memory import clock, is_out_of_memory, peak_bytes, reset_peak
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.progress import Progress, message
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.checkpoint import load_checkpoint, save_checkpoint
from lowmem_rlhf.training.optimizer import Optimizer


@dataclass(frozen=True)
class StepOutput:
    """What one training step did; ``for step in trainer`` gives one for every finished step.

    Attributes:
        metrics: the step's row of metrics.jsonl: ``step``, ``loss``, ``grad_norm``, ``learning_rate``, ``reward/mean``,
            ``time/step`` (seconds), ``memory/peak_bytes`` and more; None is a number that there is none of.
        learned_tokens: tokens whose loss had a gradient in this step.
        samples: the step's rows of samples.jsonl, a completion each; empty where nothing is sampled.
        rollout: the completions with their scores and advantages; None where nothing is sampled.
    """

    metrics: dict[str, Any]
    learned_tokens: int
    samples: Sequence[dict[str, Any]] = field(default_factory=tuple)
    rollout: Rollout | None = None


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

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        run: RunDirectory,
        updates: int = 1,
        ladder: Ladder | None = None,
    ) -> None:
        self.recipe, self.base, self.run = recipe, base, run
        settings = plan.settings
        self.ladder = ladder or Ladder.of(settings, base.device, recipe.generation.temperature)
        self.accelerator = _accelerator(base.device, recipe, run)
        set_seed(recipe.training.seed)
        base.set_gradient_checkpointing(settings.gradient_checkpointing, settings.offload_checkpoints)
        self.optimizer = Optimizer(
            base.trainable(),
            recipe.training,
            settings.optim,
            recipe.training.max_steps * updates,
            base.device,
            scale_loss=base.dtype == torch.float16,
        )
        self.step = 0
        self.learned_tokens = 0  # tokens that taught something, over all steps
        self._taken = 0  # optimizer steps of this process at the last finished step
        self._times: dict[str, float] = {}

    @abstractmethod
    def one_step(self, progress: Progress) -> StepOutput:
        """Take the step after ``self.step``; its optimizer steps go through ``self.optimizer``."""

    @abstractmethod
    def evaluate(self, when: str, progress: Progress) -> dict[str, Any]:
        """Return held-out results; empty if nothing is held out."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides weights, optimizer and step; fit for JSON."""
        return {}

    def why_nothing(self) -> str:
        """Return what a run says in which no token taught anything."""
        return self.nothing_learned

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Go on from what `state` gave."""

    def resume(self) -> None:
        """Continue from the run's latest checkpoint; a run that has none yet starts over."""
        latest = self.run.latest_checkpoint()
        if latest is None:
            message("there is no checkpoint yet: the run starts over")
            return
        message(f"going on after step {latest[0]}")
        self.step, counters = load_checkpoint(latest[1], self.base, self.optimizer, self._others())
        self.learned_tokens = counters.pop("learned_tokens")
        self.load_state(counters)

    def train(self, progress: Progress, on_step: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Run all steps and both evaluations; return evaluation.json's content.

        Args:
            progress: where the work reports.
            on_step: is given the metrics of every finished step.

        Raises:
            RunError: a reward function failed, memory ran out for good, or nothing was learned.
            KeyboardInterrupt: the user stopped it. A note on this error and on any other says which step is kept:
                the last finished one, unless the next had begun to change the weights.
        """
        try:
            with closing(self._steps(progress)) as steps:
                for finished in steps:
                    if on_step:
                        on_step(finished.metrics)
        except BaseException as error:
            error.add_note(self._keep())
            raise
        return self.run.evaluation()

    def steps(self, progress: Progress) -> Generator[StepOutput, None, None]:
        """Yield every finished step with all its metrics; both evaluations and the end of the run are a part of it.

        Whoever stops early leaves a checkpoint of the last finished step, from which `resume` goes on.

        Raises:
            RunError: as for `train`.
        """
        try:
            yield from self._steps(progress)
        except BaseException as error:
            error.add_note(self._keep())
            raise

    def _steps(self, progress: Progress) -> Generator[StepOutput, None, None]:
        evaluation = self.run.evaluation()
        if "before" not in evaluation:
            self._evaluate("before", evaluation, progress)
        try:
            while self.step < self.recipe.training.max_steps:
                finished = self._train_step(progress)
                if self.step % self.recipe.training.save_steps == 0:
                    self._save()
                yield finished
        except BaseException as error:
            if is_out_of_memory(error):
                raise RunError(
                    f"the device's memory ran out in step {self.step + 1}; close other programs that use it, or set "
                    "hardware.quantization=nf4 or hardware.optim=adamw_8bit"
                ) from error
            raise
        finally:
            self.accelerator.end_training()
        if self.recipe.training.max_steps and not self.learned_tokens:
            raise RunError(self.why_nothing())
        self._save()
        self._evaluate("after", evaluation, progress)
        with self.run.new_adapter() as folder:
            self.base.save_adapter(folder)
            for role in self._others():
                self.base.save_adapter(folder / role, role)

    def _others(self) -> list[str]:
        """Return the roles that train besides the policy."""
        return [CRITIC] if CRITIC in self.base.heads else []

    def _save(self) -> None:
        latest = self.run.latest_checkpoint()
        if latest is None or latest[0] < self.step:
            counters = {"learned_tokens": self.learned_tokens, **self.state()}
            save_checkpoint(self.run, self.step, self.base, self.optimizer, counters, self._others())

    def _keep(self) -> str:
        """Save the finished steps as long as the weights are theirs; return which are on the disk, and why no more."""
        lost_as = "the next one had begun to change the weights"
        if self.step and self.optimizer.taken == self._taken:
            try:
                self._save()
            except BaseException as error:  # what ended the run is told, and not this
                lost_as = f"they could not be saved ({' '.join(str(error).split()) or type(error).__name__})"
        latest = self.run.latest_checkpoint()
        saved = latest[0] if latest else 0
        note = f"step {saved} is kept, --resume goes on from it" if latest else "no step is kept, --resume starts over"
        lost = f"step {self.step} is" if self.step == saved + 1 else f"steps {saved + 1} to {self.step} are"
        return f"{note}; {lost} lost, as {lost_as}" if saved < self.step else note

    def _evaluate(self, when: str, evaluation: dict[str, Any], progress: Progress) -> None:
        if results := self.evaluate(when, progress):
            evaluation[when] = results
            self.run.write_evaluation(evaluation)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure a part of the step."""
        began = clock(self.base.device)
        yield
        self._times[name] = clock(self.base.device) - began

    def _train_step(self, progress: Progress) -> StepOutput:
        reset_peak(self.base.device)
        learning_rate, skipped = self.optimizer.learning_rate, self.optimizer.skipped
        before = None if self.learned_tokens else self._adapter_sum()
        self._times = {}
        output = self.one_step(progress)
        # a warm-up begins with a learning rate of zero; float16 may have left the update out
        if output.learned_tokens and learning_rate and self.optimizer.skipped == skipped:
            if before is not None and before == self._adapter_sum():
                raise RunError("the first optimizer step did not change the adapter: nothing would be learned")
            self.learned_tokens += output.learned_tokens
        self.step += 1
        self._taken = self.optimizer.taken
        metrics = {
            "step": self.step,
            **output.metrics,
            "learning_rate": learning_rate,
            "loss_scale/skipped_steps": self.optimizer.skipped,
            **{f"time/{name}": seconds for name, seconds in self._times.items()},
            "time/step": sum(self._times.values()),
            "memory/peak_bytes": peak_bytes(self.base.device),
        }
        self.run.log_metrics(metrics)
        self.run.log_samples(self.step, output.samples)
        self.accelerator.log({k: v for k, v in metrics.items() if v is not None}, step=self.step)
        return replace(output, metrics=metrics)

    def _adapter_sum(self) -> float:
        """A number that any change of the policy's adapter (or its head) changes; a critic's does not count."""
        own = [p for name, p in self.optimizer.parameters.items() if f".{POLICY}." in name]
        return sum(float(p.detach().cpu().double().abs().sum()) for p in own)


def _accelerator(device: torch.device, recipe: Recipe, run: RunDirectory) -> Accelerator:
    """Return accelerate's state on our device, with the recipe's trackers; nothing is placed or cast by it."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    trackers = list(recipe.training.report_to)
    accelerator = Accelerator(device_placement=False, log_with=trackers or None, project_dir=str(run.path))
    if trackers:
        accelerator.init_trackers(recipe.name, config={"algorithm": recipe.algorithm, "model": recipe.model})
    return accelerator
