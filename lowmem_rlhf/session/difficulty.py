"""How hard the training prompts of a recipe are for the model that its run begins with: sampled and judged beforehand.

What is written is the training rows with what was measured, so that the next run reads its curriculum from a column.
What is measured is kept beside the file as it comes, and the same command goes on from there.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.data.provenance import run_inputs
from lowmem_rlhf.data.sources import SplitRows
from lowmem_rlhf.data.values import Row, is_missing, text_of
from lowmem_rlhf.display.run_display import display_for
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import append_lines, atomic_write, dumps, read_lines, writing
from lowmem_rlhf.progress import ProgressCallback, current, message, reported_as
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.session.train import Planned, base_of, check, plan, ready
from lowmem_rlhf.stopping import check_stop, telling_what_is_kept

if TYPE_CHECKING:
    from lowmem_rlhf.data.prompts import Example
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.training.online import CompletionEvaluator

REWARD, DIFFICULTY = "measured_reward", "measured_difficulty"  # columns of what is written: the mean m, and 1 - m
_KEY = "measurement"


@dataclass(frozen=True)
class Answers:
    """What the completions of a prompt were given; None: no reward applies.

    Attributes:
        rewards: the weighted sum of each.
        accuracy: what the reward of `evaluation.accuracy` gave each.
    """

    rewards: list[float | None]
    accuracy: list[float | None]

    @property
    def mean(self) -> float | None:
        """The mean reward."""
        known = [one for one in self.rewards if one is not None]
        return sum(known) / len(known) if known else None


def measure_difficulty(recipe: Recipe, samples: int, output: Path) -> dict[str, Any]:
    """Sample completions of every training prompt as a run's first step would, score them, and write the rows.

    Args:
        samples: completions of a prompt.
        output: the file; of several tasks each has one, ``NAME-TASK.jsonl``.

    Returns:
        ``files``, ``overrides`` (of each file, with which a run learns from it by its difficulty), ``prompts``,
        ``samples``, the mean reward, and how many prompts are ``solved`` (all samples correct)
        and ``hopeless`` (none is) where the accuracy's reward tells right from wrong, ``equal`` (all samples have the
        same reward) and ``unjudged`` (none has any); with a sentence of it in ``said``.

    Raises:
        UserError: the recipe cannot run, its algorithm does not sample, or a file is in the way.
        RunError: a reward failed, the device's memory ran out, or the disk did.
    """
    files = _files(recipe, samples, output)
    display = display_for(current())
    planned = plan(check(recipe, output, False, display), display)
    planned = replace(planned, rows={task: _told_apart(rows) for task, rows in planned.rows.items()})
    with base_of(planned, display) as (base, data):
        its_plan, _ = ready(base, planned, display)
        answers = _measured(replace(planned, plan=its_plan), base, data.train, samples, _Kept(output, planned, samples))
        base.free()
    for task, file in files.items():
        own = {e.number: a for e, a in zip(data.train, answers, strict=True) if e.task == task}
        with writing(file):
            atomic_write(file, "".join(_lines(planned.rows[task].train, own)))
    _part(output).unlink()
    return _told(planned, data.train, answers, samples, files)


def _files(recipe: Recipe, samples: int, output: Path) -> dict[str, Path]:
    """Return the file of each task.

    Raises:
        UserError: it cannot be written, or nothing is sampled.
    """
    if not recipe.spec.samples:
        raise UserError(
            f"--measure-difficulty: is for algorithms that sample, and {recipe.algorithm} does not; give a recipe of "
            "grpo or another one that does, with the same data and the rewards that judge its answers"
        )
    if recipe.data.streaming:
        raise UserError(
            "--measure-difficulty: measures all rows, and data.streaming never has them all; leave that out"
        )
    if samples < 1:
        raise UserError(f"--measure-difficulty: got {samples}; give a number of samples of each prompt, from 1")
    if output.suffix != ".jsonl":
        raise UserError(f"--output: got {output}; give a file that ends in .jsonl")
    names = {task: output.with_name(f"{output.stem}-{task}.jsonl") if task else output for task in recipe.by_task}
    for file in names.values():
        if file.exists():
            raise UserError(f"--output: {file} is there already; delete it, or give another name")
        if not file.absolute().parent.is_dir():
            raise UserError(f"--output: the folder {file.parent} is not there; make it, or give another name")
    return names


def _told_apart(rows: SplitRows) -> SplitRows:
    """Return rows of which no two have one number, as those of several splits may."""
    if len({row.number for row in rows.train}) == len(rows.train):
        return rows
    return replace(rows, train=[Row(row, place) for place, row in enumerate(rows.train, start=1)])


class _Kept:
    """What was measured so far, in a file beside the one that is written at the end."""

    def __init__(self, output: Path, planned: Planned, samples: int) -> None:
        """Read what there is.

        Raises:
            UserError: it is of another measurement, or damaged.
        """
        self.path = _part(output)
        recipe = planned.checked.recipe  # without what the plan chose by the memory that is free today
        made_of = {"recipe": recipe.model_dump(), "samples": samples, **run_inputs(recipe, planned.rows)}
        key = {_KEY: hashlib.sha256(dumps(made_of).encode("utf-8", "surrogatepass")).hexdigest()}
        try:
            lines = [row for _, row in read_lines(self.path)]
        except UserError as error:  # a prompt is known by its place alone, so that no line can be left out
            raise UserError(f"{self.path} is damaged; delete the file, or give another --output") from error
        if lines and lines[0] != key:
            raise UserError(
                f"{self.path} holds {len(lines) - 1:,} prompts that were measured with another recipe, model, data or "
                "number of samples; go on with that one, delete the file, or give another --output"
            )
        self.answers = [Answers(**row) for row in lines[1:]]
        if not lines:
            self._append([key])

    def take_back(self, at_once: int) -> None:
        """Forget the part of so many prompts that a kill has torn, as its random numbers are those of the whole."""
        if torn := len(self.answers) % at_once:
            self.answers = self.answers[:-torn]
            with writing(self.path):
                atomic_write(self.path, b"".join(self.path.read_bytes().splitlines(True)[: len(self.answers) + 1]))

    def add(self, answers: Sequence[Answers]) -> None:
        """Keep what was measured of the next prompts."""
        self._append([{"rewards": one.rewards, "accuracy": one.accuracy} for one in answers])
        self.answers += answers

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with writing(self.path):
            append_lines(self.path, rows)


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _measured(
    planned: Planned, base: "SharedBase", examples: "Sequence[Example]", samples: int, kept: _Kept
) -> list[Answers]:
    """Return what each example's completions were given, beginning behind those that are kept."""
    from accelerate.utils import set_seed

    from lowmem_rlhf.training.memory import opening_ladder, savings_of
    from lowmem_rlhf.training.online import CompletionEvaluator

    recipe, its_plan = planned.recipe, planned.plan
    ladder = opening_ladder(recipe, its_plan)
    ladder.savings = savings_of(base, its_plan.settings)
    evaluator = CompletionEvaluator(recipe, its_plan, base, planned.rewards, (), ladder)
    set_seed(recipe.training.seed)
    # as many completions at once as a step has, which the plan is made for
    at_once = max(1, recipe.training.prompts_per_step * recipe.generation.num_generations // samples)
    if len(kept.answers) < len(examples):
        kept.take_back(at_once)
    total, shown = len(examples) * samples, reported_as("measuring")

    def told() -> str:
        return f"{len(kept.answers):,} of {len(examples):,} prompts are kept, the same command goes on from there"

    with telling_what_is_kept(told), _noting(told):
        for first in range(len(kept.answers), len(examples), at_once):
            part = examples[first : first + at_once]
            kept.add(_answers(evaluator, part, samples, first, partial(_further, shown, first * samples, total)))
            check_stop()
    return kept.answers


def _further(shown: ProgressCallback, before: int, total: int, done: int, _: int) -> None:
    """Show how far all is, of how far a part is."""
    shown(before + done, total)


@contextmanager
def _noting(told: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(told())
        raise


def _answers(
    evaluator: "CompletionEvaluator",
    examples: "Sequence[Example]",
    samples: int,
    first: int,
    shown: ProgressCallback,
) -> list[Answers]:
    """Sample completions of examples and score them, as a step does.

    Args:
        first: the place of the first one, of which the random numbers follow.
    """
    from lowmem_rlhf.engine.roles import POLICY
    from lowmem_rlhf.rewards.loading import rewards_by_task
    from lowmem_rlhf.training.evaluate import TrainerState, reward_tasks, sampling_of

    recipe, base, engine, tasks = evaluator.recipe, evaluator.base, evaluator.engine, evaluator.recipe.by_task
    lengths = [tasks[one.task].generation.max_completion_length for one in examples]
    seed = random.Random(f"difficulty/{recipe.training.seed}/{first}").getrandbits(40)

    def work(limits: Any) -> Any:
        with base.role(POLICY):
            engine.sync()
            prompts = [one.prompt_ids for one in examples]
            return engine.generate(prompts, samples, lengths, sampling_of(recipe), limits, seed, shown)

    completions = [one for group in evaluator.ladder.rollout(work, message) for one in group]
    repeated = [example for example in examples for _ in range(samples)]
    own_rewards, state = rewards_by_task(recipe, evaluator.rewards), TrainerState(0, recipe.training.max_steps)
    scores, _ = reward_tasks(own_rewards, base, repeated, completions, state, samples)
    totals = [None if one != one else one for one in scores.raw_total]
    found = []
    for place, example in enumerate(examples):
        rows = slice(place * samples, (place + 1) * samples)
        found.append(Answers(totals[rows], scores.by_name[tasks[example.task].evaluation.accuracy][rows]))
    return found


def _lines(rows: Sequence[Row], answers: Mapping[int, Answers]) -> Iterator[str]:
    """Yield the rows that were measured as lines of JSON, their numbers as they were written."""
    for row in rows:
        if (own := answers.get(row.number)) is not None:
            values = {key: None if is_missing(value) else value for key, value in row.items()}
            difficulty = None if own.mean is None else 1 - own.mean
            yield text_of({**values, REWARD: own.mean, DIFFICULTY: difficulty}) + "\n"


def _told(
    planned: Planned, examples: "Sequence[Example]", answers: Sequence[Answers], samples: int, files: Mapping[str, Path]
) -> dict[str, Any]:
    from lowmem_rlhf.rewards.loading import rewards_by_task
    from lowmem_rlhf.training.evaluate import CORRECT, mean, tells_right

    recipe = planned.recipe
    own_rewards = rewards_by_task(recipe, planned.rewards)
    judged = all(
        tells_right(
            own_rewards[task],
            own.evaluation.accuracy,
            [v for e, a in zip(examples, answers, strict=True) if e.task == task for v in a.accuracy],
        )
        for task, own in recipe.by_task.items()
    )
    known = [[v is not None and v >= CORRECT for v in one.accuracy] for one in answers if one.mean is not None]
    told: dict[str, Any] = {"files": [str(file) for file in files.values()], "overrides": []}
    for place, (task, file) in enumerate(files.items()):
        data = f"tasks[{place}].data" if task else "data"
        told["overrides"].append([f"{data}.train={file}", f"{data}.curriculum={{column: {DIFFICULTY}}}"])
    told |= {"prompts": len(answers), "samples": samples}
    told["mean_reward"] = mean([one.mean for one in answers])
    told["solved"] = sum(all(one) for one in known) if judged else None
    told["hopeless"] = sum(not any(one) for one in known) if judged else None
    told["equal"] = sum(one.mean is not None and len(set(one.rewards)) == 1 for one in answers)
    told["unjudged"] = sum(one.mean is None for one in answers)
    return {**told, "said": _sentence(told)}


def _sentence(told: Mapping[str, Any]) -> str:
    average = "none has a reward" if told["mean_reward"] is None else f"mean reward {told['mean_reward']:.3g}"
    parts = (
        [f"{told['equal']:,} have the same reward in all samples"]
        if told["solved"] is None
        else [f"{told['solved']:,} are solved (all samples correct)", f"{told['hopeless']:,} hopeless (none is)"]
    )
    if told["unjudged"]:
        parts.append(f"{told['unjudged']:,} have no reward and so no difficulty: a curriculum refuses these rows")
    return f"{told['prompts']:,} prompts with {told['samples']} samples each, {average}: {', '.join(parts)}"
