"""Online training: prompts -> rollout -> rewards -> advantages -> packed micro-batches -> optimizer steps.

One direction, a stage takes the previous one's values. What is done with a scored rollout is the algorithm's: GRPO,
PPO, RLOO or REINFORCE++ (`algorithms`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from lowmem_rlhf.data.curriculum import stream_of
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder, RolloutLimits, Saving
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.processes.world import current, each_its_share
from lowmem_rlhf.progress import Progress, show_samples
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.server import SERVERS
from lowmem_rlhf.rewards.guarded import faults_named
from lowmem_rlhf.rewards.loading import Reward, failed_always, rewards_by_task
from lowmem_rlhf.rollout.engine import Engine, engine_for
from lowmem_rlhf.rollout.rollout import Completion, Rollout, Share, joined_rollout
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.dynamic_sampling import sample_until_different
from lowmem_rlhf.training.evaluate import TrainerState, evaluate, learned_from, reward_tasks, sampling_of, shared
from lowmem_rlhf.training.loop import Loop, StepOutput
from lowmem_rlhf.training.memory import EVERY_PHASE
from lowmem_rlhf.training.metrics import Seen, extremes, rollout_metrics, samples, silent_rewards
from lowmem_rlhf.training.roles import share_ladder
from lowmem_rlhf.training.sampling_check import SamplingCheck
from lowmem_rlhf.training.turns import Turns

SEEN, TURNS, STREAM = "seen", "turns", "stream"  # the names of `Trainer.seen`, its turns and its stream in a checkpoint
FURTHER = 2**40  # between the seeds of one step's batches of prompts


class Algorithm(Protocol):
    """What learns from a scored rollout."""

    def learn(self, rollout: Rollout, trainer: "Trainer", progress: Progress) -> StepOutput:
        """Score the rollout in the other roles and take the optimizer steps.

        Returns:
            What the update measured, the tokens that taught something, and the rollout with its advantages.
        """
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
        ladder: the sizes that shrink when memory runs out, shared with the training.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        rewards: Sequence[Reward],
        held_out: Sequence[Example],
        ladder: Ladder,
    ) -> None:
        self.recipe, self.base, self.rewards, self.held_out = recipe, base, rewards, held_out
        self.ladder = ladder
        share_ladder(rewards, ladder)
        dequantize = plan.settings.rollout_weights == "dequantized"
        self.engine: Engine = engine_for(base, recipe.generation.engine, dequantize, served=recipe)
        if ladder.keep_graphs and (release := getattr(self.engine, "release", None)):
            ladder.savings.insert(0, Saving(EVERY_PHASE, "keep_graphs", False, release))

    def evaluate(self, when: str, progress: Progress, step: int = 0) -> dict[str, Any]:
        """Return accuracy and the mean of every reward; empty if nothing is held out."""
        if not self.held_out:
            return {}
        progress.phase(f"evaluation {when}", 0, len(self.held_out) * self.recipe.evaluation.num_samples)

        def work(limits: RolloutLimits) -> dict[str, Any]:
            with self.base.role(POLICY):
                return evaluate(
                    self.base,
                    self.engine,
                    self.held_out,
                    self.recipe,
                    self.rewards,
                    limits,
                    TrainerState(step, self.recipe.training.max_steps),
                    lambda done, total: progress.phase(f"evaluation {when}", done, total),
                )

        return self.ladder.rollout(work, progress.message)


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

    rewards_differed = (
        "nothing was learned, although completions of a prompt had different rewards: no optimizer step with a "
        "learning rate above 0 was taken on them; look at learning_rate, grad_norm and loss_scale/skipped_steps in "
        "metrics.jsonl"
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
        self.rewards = rewards
        self.evaluator = CompletionEvaluator(recipe, plan, base, rewards, held_out, self.ladder)
        self.stream = stream_of(train, recipe)
        self._rewards_by_task = rewards_by_task(recipe, rewards)
        self._lengths = {task: own.generation.max_completion_length for task, own in recipe.by_task.items()}
        self.algorithm = algorithm
        self._batches = getattr(algorithm, "max_generation_batches", 1)
        self._turns = Turns(self.stream, train, getattr(algorithm, "set_aside_steps", 0))
        self._in_turn = self._batches > 1 or self._turns.set_aside_steps > 0  # prompts follow from earlier steps
        self._told: dict[str, Any] = {}  # metrics of the last rollout
        settings, temperature = plan.settings, recipe.generation.temperature
        checked = recipe.hardware.check == "always"
        server = recipe.generation.engine in SERVERS
        self.sampling = SamplingCheck(settings.quantization, settings.compute_dtype, temperature, checked, server)
        self.seen = Seen()
        self._noted = ""  # what was said about how tokens are decoded

    def state(self) -> dict[str, Any]:
        """See `Loop.state`."""
        turns = {TURNS: self._turns.state()} if self._in_turn else {}
        stream = {STREAM: state} if (state := self.stream.state()) else {}
        return {**self.algorithm.state(), SEEN: asdict(self.seen), **turns, **stream}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Loop.load_state`."""
        self.seen = Seen(**state.pop(SEEN)) if SEEN in state else Seen(1, 1, 1, 1)  # older checkpoints do not tell
        self._turns.load_state(state.pop(TURNS, None), self.step)
        self.stream.load_state(state.pop(STREAM, None))
        self.algorithm.load_state(state)

    def why_nothing(self) -> str:
        """See `Loop.why_nothing`."""
        failed = failed_always(self.rewards)
        length, masked = self.recipe.generation.max_completion_length, getattr(self.algorithm, "masks_cut", False)
        if why := self.seen.why_nothing(length, failed, masked):
            return why
        return self.rewards_differed if self.seen.judged_apart else self.nothing_learned

    def last_words(self) -> list[str]:
        """See `Loop.last_words`."""
        return failed_always(self.rewards)

    def evaluate(self, when: str, progress: Progress) -> dict[str, Any]:
        """Sample held-out completions in the policy's role and score them."""
        return self.evaluator.evaluate(when, progress, self.step)

    def one_step(self, progress: Progress) -> StepOutput:
        """Roll out, score, learn."""
        with self.timed("rollout"):
            rollout = self._rollout(progress)
        if found := extremes(rollout):
            show_samples(progress, *found)
        if self.step == 0:
            for sentence in silent_rewards(rollout):
                progress.message(sentence)
        skipped, name = self.optimizer.skipped, self.recipe.algorithm
        with faults_named(f"algorithm {name}", name.rpartition(":")[0]):
            output = self.algorithm.learn(rollout, self, progress)
        assert output.rollout is not None
        self.seen = self.seen.with_rollout(output.rollout)
        difference = output.metrics.get("sampling/logp_difference")
        if difference is not None and not math.isfinite(difference) and self.optimizer.skipped > skipped:
            difference = None  # the step was left out for it, which says more
        self.sampling.check(difference, self.step + 1, progress.message)
        return replace(
            output,
            metrics={**rollout_metrics(output.rollout), **self._told, **output.metrics},
            samples=samples(output.rollout, self.recipe.training.log_completions),
        )

    def _rollout(self, progress: Progress) -> Rollout:
        """Sample completions of the next prompts and score them."""
        normalize, prompts = self.recipe.mixing.normalize, self.recipe.training.prompts_per_step
        if not self._in_turn:
            rollout, again = self._batch(self.stream.batch(self.step), 0, progress), False
        else:
            rollout, self._told = sample_until_different(
                lambda examples, number: self._batch(examples, number, progress),
                self._turns,
                prompts,
                self._batches,
                self.step,
            )
            again = self._told["groups/sampled"] > prompts
        again = again or current().several  # what a reward normalises by is the whole step's
        return learned_from(self._rewards_by_task, rollout, normalize) if normalize or again else rollout

    def _batch(self, examples: Sequence[Example], number: int, progress: Progress) -> Rollout:
        """Sample completions of these prompts, the step's batch of this number, and score them.

        Of several processes each does so for its share of the prompts, and all have the whole afterwards.
        """
        group, lengths = self.recipe.generation.num_generations, [self._lengths[one.task] for one in examples]
        costs = [len(one.prompt_ids) + group * length for one, length in zip(examples, lengths, strict=True)]

        def sampled(own: range) -> Rollout:
            share = Share(own.start * group, len(examples) * group, max(lengths)) if len(own) < len(examples) else None
            return self._own_batch([examples[place] for place in own], number, progress, share)

        parts = each_its_share(costs, sampled)
        return joined_rollout(parts) if len(parts) > 1 else parts[0]

    def _own_batch(
        self, examples: Sequence[Example], number: int, progress: Progress, share: Share | None = None
    ) -> Rollout:
        count, prompts = self.recipe.generation.num_generations, [example.prompt_ids for example in examples]
        completions = [completion for group in self._sampled(examples, number, progress, share) for completion in group]
        if (note := getattr(self.evaluator.engine, "note", "")) and note != self._noted:
            progress.message(note)
            self._noted = note
        repeated = [example for example in examples for _ in range(count)]
        progress.phase("rewards")
        state = TrainerState(self.step, self.recipe.training.max_steps)
        scores, texts = reward_tasks(self._rewards_by_task, self.base, repeated, completions, state, count)
        questions, tasks = [one.prompt for one in examples], [one.task for one in examples]
        rollout = Rollout(prompts, completions, count, questions, texts, scores)
        return replace(rollout, tasks=tasks) if self.recipe.tasks else rollout

    def _sampled(
        self, examples: Sequence[Example], number: int, progress: Progress, share: Share | None
    ) -> list[list[Completion]]:
        generation, engine = self.recipe.generation, self.evaluator.engine
        prompts, each = [one.prompt_ids for one in examples], [self._lengths[one.task] for one in examples]
        lengths = each if len(set(self._lengths.values())) > 1 else generation.max_completion_length

        def work(limits: RolloutLimits) -> list[list[Completion]]:
            with self.base.role(POLICY):
                engine.sync()
                return engine.generate(
                    prompts,
                    generation.num_generations,
                    lengths,
                    sampling_of(self.recipe),
                    limits,
                    seed=(self.recipe.training.seed + 1) * 1_000_003 + self.step + number * FURTHER,
                    progress=lambda done, total: progress.phase("rollout", done, total),
                    **shared(share),
                )

        return self.ladder.rollout(work, progress.message)
