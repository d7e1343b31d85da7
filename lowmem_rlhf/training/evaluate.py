"""Held-out evaluation: sample completions of prompts never trained on and score them with the recipe's rewards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from lowmem_rlhf.architecture.stops import written_text
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.processes.world import each_its_share
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.combining import standardized, totals
from lowmem_rlhf.rewards.loading import Reward, rewards_by_task
from lowmem_rlhf.rewards.scoring import score
from lowmem_rlhf.rollout.engine import Engine
from lowmem_rlhf.rollout.rollout import Completion, Rollout, Share
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.scores import Scores, joined
from lowmem_rlhf.run.held_out import ACCURACY, MEAN_REWARD
from lowmem_rlhf.training import intervals
from lowmem_rlhf.training.quantities import of_completions

CORRECT = 1.0  # the accuracy reward's value from which a completion counts as correct


@dataclass(frozen=True)
class TrainerState:
    """What reward functions can ask of the run, under TRL's names."""

    global_step: int
    max_steps: int


def reward_completions(
    rewards: Sequence[Reward],
    base: SharedBase,
    examples: Sequence[Example],
    completions: Sequence[Completion],
    state: TrainerState,
    num_generations: int | None = None,
) -> tuple[Scores, list[str]]:
    """Score completions of examples (one each); return the scores and the completions' texts.

    A text is what was written: special tokens that are tags stay in it, the stop at the end does not.

    Args:
        num_generations: completions of a prompt, where they are learned from (see `score`).

    Raises:
        RunError: a reward function failed.
    """
    stops = base.stop_ids
    texts = [written_text(base.tokenizer, c.ids, stops) for c in completions]
    messages = [
        text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
        for example, text in zip(examples, texts, strict=True)
    ]
    names = {name for example in examples for name in example.columns}
    columns = {name: [example.columns.get(name) for example in examples] for name in sorted(names)}
    scores = score(
        rewards,
        [e.prompt for e in examples],
        messages,
        [c.ids for c in completions],
        columns,
        state,
        [e.prompt_ids for e in examples],
        [e.text for e in examples],
        num_generations,
    )
    return scores, texts


def reward_tasks(
    rewards: Mapping[str, Sequence[Reward]],
    base: SharedBase,
    examples: Sequence[Example],
    completions: Sequence[Completion],
    state: TrainerState,
    num_generations: int | None = None,
) -> tuple[Scores, list[str]]:
    """Score completions of examples (one each) with the rewards (by task) of each; see `reward_completions`."""
    if list(rewards) == [""]:
        return reward_completions(rewards[""], base, examples, completions, state, num_generations)
    texts, parts = [""] * len(completions), []
    for task, own in rewards.items():
        if not (rows := [row for row, example in enumerate(examples) if example.task == task]):
            continue
        answered, written = [examples[row] for row in rows], [completions[row] for row in rows]
        scores, own_texts = reward_completions(own, base, answered, written, state, num_generations)
        parts.append((rows, scores))
        for row, text in zip(rows, own_texts, strict=True):
            texts[row] = text
    return joined(parts), texts


def learned_from(rewards: Mapping[str, Sequence[Reward]], rollout: Rollout, normalize: bool) -> Rollout:
    """Return a rollout with the sums that are learned from, made anew of its rewards' values.

    What a reward's `normalize` compares are the completions of this rollout then, not of the batches that were sampled.

    Args:
        rewards: by task.
        rollout: scored.
        normalize: standardise the sums over the completions of each task, too.
    """
    scores, group = rollout.scored, rollout.num_generations
    total, raw = list(scores.total), list(scores.raw_total)
    tasks = [task for task in rollout.tasks or [""] * len(rollout.prompts) for _ in range(group)]
    for task, own in rewards.items():
        rows = [row for row, name in enumerate(tasks) if name == task]
        values = {one.name: [scores.by_name[one.name][row] for row in rows] for one in own} if rows else {}
        sums, raw_sums = totals(own, values, group) if rows else ([], [])
        if normalize and rows:
            known = standardized([None if one != one else one for one in sums], len(sums))
            sums = [math.nan if one is None else one for one in known]
        for row, learned, before in zip(rows, sums, raw_sums, strict=True):
            total[row], raw[row] = learned, before
    return replace(rollout, scores=replace(scores, total=total, raw=raw))


def sampling_of(recipe: Recipe) -> Sampling:
    """Return how the recipe samples its rollouts."""
    return Sampling.of(recipe.generation)


@dataclass(frozen=True)
class Sampled:
    """Held-out completions and what they scored; completion n answers problem n // samples.

    Attributes:
        samples: completions a problem.
        temperature: at which they were drawn.
    """

    completions: Sequence[Completion]
    scores: Scores
    samples: int
    temperature: float

    def correct(self, accuracy: str) -> list[bool | None]:
        """Return whether each completion is correct by the reward of this name; None: it does not apply."""
        return [None if value is None else value >= CORRECT for value in self.scores.by_name[accuracy]]


def sample(
    base: SharedBase,
    engine: Engine,
    examples: Sequence[Example],
    recipe: Recipe,
    rewards: Sequence[Reward],
    limits: RolloutLimits,
    state: TrainerState,
    progress: ProgressCallback | None = None,
) -> Sampled:
    """Answer held-out examples as `evaluation` says, in the role that ``base`` is in, and score the answers.

    The same problems and random numbers every time, so that two roles or moments differ by the policy alone.
    """
    settings, length = recipe.evaluation, recipe.generation.max_completion_length
    sampling, count = Sampling.of(recipe.generation, settings.temperature), settings.num_samples

    def answered(own: range) -> tuple[list[Completion], Scores]:
        asked = [examples[place] for place in own]
        share = Share(own.start * count, len(examples) * count, length) if len(own) < len(examples) else None
        engine.sync()
        groups = engine.generate(
            [example.prompt_ids for example in asked],
            count,
            length,
            sampling,
            limits,
            seed=recipe.training.seed,
            progress=progress,
            **shared(share),
        )
        completions = [completion for group in groups for completion in group]
        repeated = [example for example in asked for _ in range(count)]
        return completions, reward_completions(rewards, base, repeated, completions, state)[0]

    parts = each_its_share([len(one.prompt_ids) + count * length for one in examples], answered)
    completions = [completion for own, _ in parts for completion in own]
    return Sampled(completions, _in_order([scores for _, scores in parts]), count, sampling.temperature)


def shared(share: Share | None) -> dict[str, Share]:
    """Return the argument that tells an engine of its share; an engine of a single process need not know of it."""
    return {"share": share} if share else {}


def _in_order(parts: Sequence[Scores]) -> Scores:
    """Return the scores of completions that follow each other in parts."""
    if len(parts) == 1:
        return parts[0]
    ends = list(accumulate(len(one.total) for one in parts))
    return joined([(range(end - len(one.total), end), one) for one, end in zip(parts, ends, strict=True)])


def evaluate(
    base: SharedBase,
    engine: Engine,
    examples: Sequence[Example],
    recipe: Recipe,
    rewards: Sequence[Reward],
    limits: RolloutLimits,
    state: TrainerState,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Return accuracy and the mean of every reward on held-out examples (see `sample`); ``tasks`` has those of each."""
    parts: dict[str, _Answers] = {}
    own_rewards, total = rewards_by_task(recipe, rewards), len(examples) * recipe.evaluation.num_samples
    for task, own in recipe.by_task.items():
        asked = [one for one in examples if one.task == task] if recipe.tasks else examples
        if not asked:
            continue
        before = sum(len(one.sampled.completions) for one in parts.values())

        def shown(done: int, _: int, before: int = before) -> None:
            if progress:
                progress(before + done, total)

        done = sample(base, engine, asked, own, own_rewards[task], limits, state, shown)
        parts[task] = _Answers(done, own.evaluation.accuracy, own_rewards[task])
    told = _told(list(parts.values()))
    return {**told, "tasks": {task: _told([one]) for task, one in parts.items()}} if recipe.tasks else told


@dataclass(frozen=True)
class _Answers:
    """The answers of one task, the reward that says which are correct, and all that judged them."""

    sampled: Sampled
    accuracy: str
    rewards: Sequence[Reward]

    @property
    def problems(self) -> int:
        return len(self.sampled.completions) // self.sampled.samples


def _told(parts: Sequence[_Answers]) -> dict[str, Any]:
    """Return what the answers of one or more tasks give, with intervals."""
    scores = [one.sampled.scores for one in parts]
    names = dict.fromkeys(name for one in scores for name in one.by_name)
    completions = [completion for one in parts for completion in one.sampled.completions]
    columns = intervals.joined(
        [of_completions(one.sampled, one.accuracy) for one in parts], [one.problems for one in parts]
    )
    headlines = [headline_of_answers(one.sampled, one.rewards, one.accuracy) for one in parts]
    first = parts[0].sampled
    return {
        "accuracy": mean([right for one in parts for right in one.sampled.correct(one.accuracy)]),
        "reward/mean": mean([total for one in scores for total in one.total if total == total]),
        **{f"reward/{name}": mean([v for one in scores for v in one.by_name.get(name, ())]) for name in names},
        "completion/mean_length": mean([float(len(c.ids)) for c in completions]),
        "completion/truncated": mean([float(c.truncated) for c in completions]),
        "problems": sum(one.problems for one in parts),
        "samples": first.samples,
        "temperature": first.temperature,
        "headline": ACCURACY if set(headlines) == {ACCURACY} else MEAN_REWARD,
        "intervals": intervals.bounds(columns),
    }


def headline_of_answers(sampled: Sampled, rewards: Sequence[Reward], accuracy: str) -> str:
    """Return the measure that answers are reported by: the accuracy if it tells right from wrong, or the mean reward.

    Args:
        rewards: that judged them.
        accuracy: the reward that says what is right (see `Reward.judges_correct`); if nobody says whether it does, it
            does where all of its values are 0 or 1.
    """
    return ACCURACY if tells_right(rewards, accuracy, sampled.scores.by_name[accuracy]) else MEAN_REWARD


def tells_right(rewards: Sequence[Reward], accuracy: str, values: Sequence[float | None]) -> bool:
    """Whether a reward, by its name, tells right from wrong, of which it gave these values."""
    said = next((reward.judges_correct for reward in rewards if reward.name == accuracy), None)
    return {value for value in values if value is not None} <= {0.0, 1.0} if said is None else said


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None when there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
