"""Online training: prompts -> rollout -> rewards -> advantages -> packed micro-batches -> optimizer steps.

One direction, a stage takes the previous one's values. What is done with a scored rollout is the algorithm's:
`algorithms.grpo`, or `algorithms.ppo` for PPO, RLOO and REINFORCE++.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.hardware.memory import retry_with_smaller
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.progress import Progress
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.rollout.rollout import Batch, Completion
from lowmem_rlhf.rollout.shared_prompt import Limits, generate
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.evaluate import TrainerState, evaluate, reward_completions, sampling_of
from lowmem_rlhf.training.loop import Loop, StepResult
from lowmem_rlhf.training.metrics import Rollout, Seen, rollout_metrics, samples, silent_rewards
from lowmem_rlhf.training.sampling_check import SamplingCheck

T = TypeVar("T")
SEEN = "seen"  # the name of `Trainer.seen` in a checkpoint


@dataclass(frozen=True)
class Learned:
    """What an algorithm made of a rollout: its batch with advantages, metrics, and the rows that taught something."""

    batch: Batch
    metrics: dict[str, Any]
    signal: Sequence[int]


class Algorithm(Protocol):
    """What learns from a scored rollout."""

    def learn(self, rollout: Rollout, trainer: "Trainer", progress: Progress) -> Learned:
        """Score the rollout with the other roles and take the optimizer steps."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...


class CompletionEvaluator:
    """Samples held-out completions of the policy and scores them; shared by everything that evaluates so.

    Args:
        recipe, plan, base, rewards: as `Trainer`'s.
        held_out: prompts never trained on.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, base: SharedBase, rewards: Sequence[Reward], held_out: Sequence[Example]
    ) -> None:
        self.recipe, self.base, self.rewards, self.held_out = recipe, base, rewards, held_out
        settings = plan.settings
        self.limits = Limits(settings.rollout_batch_size, settings.micro_batch_tokens, settings.logits_tile_tokens)
        self.dequantize = settings.rollout_weights == "dequantized"

    def evaluate(self, when: str, progress: Progress, step: int = 0) -> dict[str, Any]:
        """Return accuracy and the mean of every reward; empty if nothing is held out."""
        if not self.held_out:
            return {}

        def work(rows: int) -> dict[str, Any]:
            with self.base.role(POLICY), self.base.decoding(self.dequantize):
                return evaluate(
                    self.base,
                    self.held_out,
                    self.recipe,
                    self.rewards,
                    replace(self.limits, rows=rows),
                    TrainerState(step, self.recipe.training.max_steps),
                    lambda done, total: progress.phase(f"evaluation {when}", done, total),
                )

        return self.with_fewer_rows(work, progress)

    def with_fewer_rows(self, work: Callable[[int], T], progress: Progress) -> T:
        """Sample; when memory runs out, write fewer completions at once from then on."""
        key = "hardware.rollout_batch_size"
        result, rows = retry_with_smaller(work, self.limits.rows, 1, key, self.base.device, progress.message)
        self.limits = replace(self.limits, rows=rows)
        return result


class Trainer(Loop):
    """Online training on a SharedBase.

    Args:
        recipe, plan: what to do and the chosen settings.
        base: the shared base with its policy adapter, and the roles that the algorithm needs.
        rewards: the reward functions.
        train, held_out: prompts to train on and to evaluate on.
        run: where everything is written.
        algorithm: what learns from a scored rollout.
        updates: optimizer steps of each step.
    """

    nothing_learned = (
        "nothing was learned: in every step all completions of each prompt had the same reward, so no advantage was "
        "left; look at samples.jsonl, make the task easier or the reward finer, or raise generation.num_generations"
    )

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        rewards: Sequence[Reward],
        train: Sequence[Example],
        held_out: Sequence[Example],
        run: RunDirectory,
        algorithm: Algorithm,
        updates: int,
    ) -> None:
        super().__init__(recipe, plan, base, run, updates)
        self.rewards, self.judge = rewards, CompletionEvaluator(recipe, plan, base, rewards, held_out)
        self.stream = PromptStream(train, recipe.training.prompts_per_step, recipe.training.seed)
        self.algorithm = algorithm
        settings, temperature = plan.settings, recipe.generation.temperature
        checked = recipe.hardware.check == "always"
        self.sampling = SamplingCheck(settings.quantization, settings.compute_dtype, temperature, checked)
        self.seen = Seen()

    def state(self) -> dict[str, Any]:
        """See `Loop.state`."""
        return {**self.algorithm.state(), SEEN: asdict(self.seen)}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Loop.load_state`."""
        self.seen = Seen(**state.pop(SEEN)) if SEEN in state else Seen(1, 1, 1, 1)  # older checkpoints do not tell
        self.algorithm.load_state(state)

    def why_nothing(self) -> str:
        """See `Loop.why_nothing`."""
        return self.seen.why_nothing(self.recipe.generation.max_completion_length) or self.nothing_learned

    def evaluate(self, when: str, progress: Progress) -> dict[str, Any]:
        """Sample held-out completions in the policy's role and score them."""
        return self.judge.evaluate(when, progress, self.step)

    @property
    def limits(self) -> Limits:
        """What bounds a rollout's memory, as it is by now."""
        return self.judge.limits

    def one_step(self, progress: Progress) -> StepResult:
        """Roll out, score, learn."""
        with self.timed("rollout"):
            rollout = self._rollout(progress)
        if self.step == 0:
            for said in silent_rewards(rollout):
                progress.message(said)
        learned = self.algorithm.learn(rollout, self, progress)
        self.seen = self.seen.with_rollout(rollout)  # not before: a step that fails is taken again
        self.sampling.look(learned.metrics.get("sampling/logp_difference"), self.step + 1, progress.message)
        return StepResult(
            {**rollout_metrics(rollout, learned.batch), **learned.metrics},
            sum(len(rollout.completions[row].ids) for row in learned.signal),
            samples(rollout, learned.batch, self.recipe.training.log_completions),
        )

    def _rollout(self, progress: Progress) -> Rollout:
        generation, seed = self.recipe.generation, self.recipe.training.seed
        examples = self.stream.batch(self.step)

        def work(rows: int) -> list[list[Completion]]:
            with self.base.role(POLICY), self.base.decoding(self.judge.dequantize):
                return generate(
                    self.base,
                    [example.prompt_ids for example in examples],
                    generation.num_generations,
                    generation.max_completion_length,
                    sampling_of(self.recipe),
                    replace(self.limits, rows=rows),
                    seed=(seed + 1) * 1_000_003 + self.step,
                    progress=lambda done, total: progress.phase("rollout", done, total),
                )

        groups = self.judge.with_fewer_rows(work, progress)
        repeated = [example for example in examples for _ in range(generation.num_generations)]
        completions = [completion for group in groups for completion in group]
        progress.phase("rewards")
        state = TrainerState(self.step, self.recipe.training.max_steps)
        scores, texts = reward_completions(self.rewards, self.base, repeated, completions, state)
        return Rollout(examples, completions, texts, scores)
