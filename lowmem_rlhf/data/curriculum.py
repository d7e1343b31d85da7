"""The order in which a recipe sees its examples: shuffled, mixed of several tasks, or from easy to hard."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar

from lowmem_rlhf.data.stream import MixedStream, PromptStream, Stream
from lowmem_rlhf.data.streaming import Streamed, WindowStream
from lowmem_rlhf.data.values import value_at
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import DataConfig

Item = TypeVar("Item")


class CurriculumStream(PromptStream[Item]):
    """Draws from the easiest share of the examples, which grows to all of them; then each once an epoch.

    After t of T steps the share is sqrt(t / T (1 - s^2) + s^2), s at the start (competence of Platanios et al. 2019,
    arXiv 1903.09848, eq. 7). A step's examples differ as far as the share has as many. It has no state, as its parent.
    """

    def __init__(
        self,
        examples: Sequence[Item],
        difficulties: Sequence[float],
        start: float,
        steps: float,
        prompts_per_step: int,
        seed: int,
    ) -> None:
        """Keep the examples.

        Args:
            examples: in any order.
            difficulties: of each; equal ones count as given.
            start: the share that training begins with, above 0.
            steps: T, after which all are in.
            prompts_per_step: see `PromptStream`.
            seed: chooses the order.
        """
        super().__init__(examples, prompts_per_step, seed)
        self.start, self.steps = start, steps
        self._easiest = sorted(range(len(examples)), key=lambda number: difficulties[number])
        self._drawn = lru_cache(maxsize=4)(self._draw)

    def share(self, step: int) -> float:
        """Return the share of the examples that a step draws from."""
        if step >= self.steps:
            return 1.0
        return math.sqrt(step / self.steps * (1 - self.start**2) + self.start**2)

    def _draw(self, step: int) -> list[int]:
        pool = self._easiest[: max(1, math.ceil(self.share(step) * len(self.examples)))]
        order = random.Random(f"curriculum/{self.seed}/{step}").sample(pool, len(pool))
        return [order[place % len(order)] for place in range(self.prompts_per_step)]

    def at(self, place: int) -> Item:
        """Return the example at a place of the endless order, from 0."""
        step, offset = divmod(place, self.prompts_per_step)
        return super().at(place) if step >= self.steps else self.examples[self._drawn(step)[offset]]


def check_difficulties(examples: Sequence[Any], data: DataConfig) -> None:
    """Check that each prompt has a difficulty, where the recipe goes by one.

    Raises:
        UserError: one has none.
    """
    if data.curriculum is not None:
        _difficulties(examples, data.curriculum.column)


def stream_of(examples: Sequence[Any], recipe: Recipe) -> Stream[Any]:
    """Return the order in which a recipe's training sees its examples.

    Raises:
        UserError: there are none, of all or of a task; or one has no difficulty where the recipe goes by one.
    """
    count = recipe.training.prompts_per_step
    if isinstance(examples, Streamed):
        return WindowStream(examples.window, count, recipe.training.seed)
    if not recipe.tasks:
        return _of_one(examples, recipe, recipe.data, count, 1.0)
    parts = {task.name: [one for one in examples if one.task == task.name] for task in recipe.tasks}
    shares = recipe.mixing.shares([task.weight for task in recipe.tasks], [len(own) for own in parts.values()])
    streams = [
        _of_one(own, recipe, task.data, 1, count * share)
        for own, task, share in zip(parts.values(), recipe.tasks, shares, strict=True)
    ]
    return MixedStream(streams, shares, count)


def _of_one(
    examples: Sequence[Any], recipe: Recipe, data: DataConfig, prompts_per_step: int, turns: float
) -> PromptStream[Any]:
    """Return the stream of one task, which has so many turns in a step of the run for each step of its own."""
    seed, curriculum = recipe.training.seed, data.curriculum
    if curriculum is None:
        return PromptStream(examples, prompts_per_step, seed)
    steps = curriculum.steps or max(1, recipe.training.max_steps // 2)
    difficulties = _difficulties(examples, curriculum.column)
    return CurriculumStream(examples, difficulties, curriculum.start, steps * turns, prompts_per_step, seed)


def _difficulties(examples: Sequence[Any], column: str) -> list[float]:
    values = [value_at(one.columns, column) for one in examples]
    for value in values:
        if not _is_number(value):
            raise UserError(
                f"data.curriculum.column: {column!r} must hold a number in every row, the easier the smaller; got "
                f"{'nothing' if value is None else repr(value)} (columns: {', '.join(examples[0].columns)})"
            )
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
