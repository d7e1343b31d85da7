"""Measuring the roles of a target on its held-out problems: all roles get the same prompts and random numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from lowmem_rlhf.algorithms.reward_model.update import pair_groups
from lowmem_rlhf.data.bad_rows import RowReport
from lowmem_rlhf.data.examples import examples_of
from lowmem_rlhf.data.prompts import build_examples
from lowmem_rlhf.data.supervised import Pair, Supervised
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs, head_outputs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.evaluation.target import EvalTarget
from lowmem_rlhf.inference.opening import memory_explained
from lowmem_rlhf.progress import ProgressCallback, message, reported_as
from lowmem_rlhf.recipe.tasks import of_task
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.run.held_out import ACCURACY, LOSS, MEAN_REWARD
from lowmem_rlhf.training.evaluate import TrainerState, headline_of_answers, sample
from lowmem_rlhf.training.intervals import Column, joined
from lowmem_rlhf.training.quantities import of_completions, of_losses, of_pairs

Columns = dict[str, Column]
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """Results of one kind for each target, all on the same problems.

    Attributes:
        noun: what a problem is: problem, example, pair.
        problems: how many there are.
        columns: quantities by target.
        headline: the quantity that is shown first.
    """

    noun: str
    problems: int
    columns: dict[str, Columns]
    headline: str


def measure_target(target: EvalTarget) -> dict[str, list[Measured]]:
    """Return the results of a target by task: held-out loss (sft), pairs ranked correctly, judged answers.

    Raises:
        UserError: the held-out rows do not suit.
        RunError: a reward failed, or the device's memory ran out.
    """
    measured = {}
    for task, own in target.by_task().items():
        with memory_explained(target.recipe), of_task(task):
            measured[task] = _measured(own)
    return measured


def of_all_tasks(measured: Mapping[str, list[Measured]]) -> list[Measured]:
    """Return the results over the problems of all tasks together."""
    kinds: dict[str, Measured] = {}
    for one in (one for own in measured.values() for one in own):
        kinds[one.noun] = one if (other := kinds.get(one.noun)) is None else _both(other, one)
    return list(kinds.values())


def _both(first: Measured, second: Measured) -> Measured:
    """Return one result of both; a quantity that only one of them has does not apply to the other's problems."""
    problems = [first.problems, second.problems]
    columns = {name: joined([one, second.columns[name]], problems) for name, one in first.columns.items()}
    headline = first.headline if first.headline == second.headline else MEAN_REWARD
    return Measured(first.noun, sum(problems), columns, headline)


def _measured(target: EvalTarget) -> list[Measured]:
    spec = target.recipe.spec
    if spec.output == "scores":
        return [_pairs(target)]
    measured = [_losses(target)] if spec.rows == "completions" else []
    if spec.rows in ("pairs", "answers"):
        measured = [_preferred(target)]
    return measured + ([_answers(target)] if target.rewards else [])


def _report(target: EvalTarget) -> RowReport:
    return RowReport(target.recipe.data, target.recipe.data.eval or "")


def _answers(target: EvalTarget) -> Measured:
    base, recipe = target.base, target.recipe
    examples = build_examples(target.rows[""], recipe.data, base.tokenizer, base.stop_ids, _report(target))
    _check_positions(target, max(len(one.prompt_ids) for one in examples))
    state = TrainerState(target.steps or 0, recipe.training.max_steps)
    accuracy, headlines = recipe.evaluation.accuracy, set[str]()
    columns: dict[str, Columns] = {}
    for name, role in target.roles.items():

        def work(limits: RolloutLimits, name: str = name, role: str = role) -> Columns:
            with base.role(role):
                done = sample(base, target.engine, examples, recipe, target.rewards, limits, state, reported_as(name))
            headlines.add(headline_of_answers(done, target.rewards, accuracy))
            return of_completions(done, accuracy)

        columns[name] = target.ladder.rollout(work, message)
    return Measured("problem", len(examples), columns, MEAN_REWARD if MEAN_REWARD in headlines else ACCURACY)


def _check_positions(target: EvalTarget, longest: int) -> None:
    positions = getattr(target.base.model.config.get_text_config(), "max_position_embeddings", None)
    tokens = longest + target.recipe.generation.max_completion_length
    if isinstance(positions, int) and tokens > positions:
        raise UserError(
            f"the longest prompt ({longest} tokens) and an answer of up to {tokens - longest} make {tokens}, but "
            f"{target.base.model_id!r} has only {positions} positions; lower --max-tokens"
        )


def _losses(target: EvalTarget) -> Measured:
    base, recipe = target.base, target.recipe
    report = _report(target)
    examples: list[Supervised] = examples_of(recipe, target.rows[""], base.tokens, report)
    columns = {name: _loss(target, role, examples, name) for name, role in target.roles.items()}
    return Measured("example", len(examples), columns, LOSS)


def _loss(target: EvalTarget, role: str, examples: list[Supervised], name: str) -> Columns:
    completions = [Completion(one.completion_ids, [], False) for one in examples]
    batch = Rollout([one.prompt_ids for one in examples], completions, 1)

    def work(limits: BatchLimits, shown: ProgressCallback) -> dict[int, torch.Tensor]:
        with target.base.role(role):
            return completion_logprobs(target.base, batch.groups(range(len(examples))), limits, shown)

    logps = _fitted(target, work, f"{name}, loss")
    losses = []
    for row, one in enumerate(examples):
        mask = one.learned or [True] * len(one.completion_ids)
        learned = torch.tensor(mask, dtype=torch.bool, device=logps[row].device)
        losses.append(-float(logps[row].double()[learned].sum()))
    return of_losses(losses, [one.learned_tokens for one in examples])


def _pairs(target: EvalTarget) -> Measured:
    base, recipe = target.base, target.recipe
    pairs: list[Pair] = examples_of(recipe, target.rows[""], base.tokens, _report(target))

    def work(limits: BatchLimits, shown: ProgressCallback) -> dict[int, torch.Tensor]:
        return head_outputs(base, POLICY, pair_groups(pairs), limits, shown)

    scores = _fitted(target, work, POLICY)
    ends = torch.stack([scores[row][-1] for row in range(2 * len(pairs))])
    return Measured("pair", len(pairs), {POLICY: of_pairs(ends[::2], ends[1::2])}, ACCURACY)


def _preferred(target: EvalTarget) -> Measured:
    """Measure which answer of each pair a role finds likelier, by its mean log-prob a token: accuracy and margin."""
    from lowmem_rlhf.algorithms.trl.data import pairs_among

    base, recipe = target.base, target.recipe
    pairs = pairs_among(examples_of(recipe, target.rows[""], base.tokens, _report(target)))
    if not pairs:
        raise UserError(f"the held-out data of {recipe.name!r} has no pair of a good and a bad answer to measure")
    answers = [Completion(ids, [], False) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    batch = Rollout([pair.prompt_ids for pair in pairs], answers, 2)
    columns: dict[str, Columns] = {}
    for name, role in target.roles.items():

        def work(limits: BatchLimits, shown: ProgressCallback, role: str = role) -> dict[int, torch.Tensor]:
            with base.role(role):
                return completion_logprobs(base, batch.groups(range(len(answers))), limits, shown)

        logps = _fitted(target, work, f"{name}, pairs")
        means = torch.stack([logps[row].mean() for row in range(len(answers))])
        columns[name] = of_pairs(means[::2], means[1::2])
    return Measured("pair", len(pairs), columns, ACCURACY)


def _fitted(target: EvalTarget, work: Callable[[BatchLimits, ProgressCallback], T], name: str) -> T:
    """Run passes over a batch, with smaller micro-batches if memory runs out."""
    return target.ladder.score(lambda limits: work(limits, reported_as(name)), message)
