"""The order in which training sees its prompts, pairs or other examples. No torch here."""

import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

from lowmem_rlhf.errors import UserError

Item = TypeVar("Item")


class Stream(ABC, Generic[Item]):
    """An endless order of examples; a step sees the next ``prompts_per_step`` of them."""

    prompts_per_step: int

    @abstractmethod
    def at(self, place: int) -> Item:
        """Return the example at a place of the endless order, from 0."""

    def batch(self, step: int) -> list[Item]:
        """Return the ``prompts_per_step`` examples of a step, counted from 0."""
        first = step * self.prompts_per_step
        return [self.at(first + offset) for offset in range(self.prompts_per_step)]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run need not find it out again; most have nothing."""
        return {}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` gave; None: nothing was kept."""
        return


class PromptStream(Stream[Item]):
    """The endless, shuffled order of prompts, or of other examples: each once an epoch, each epoch in another order.

    It has no state: a batch is a function of (seed, step), so a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, examples: Sequence[Item], prompts_per_step: int, seed: int) -> None:
        """Keep the examples; with fewer than ``prompts_per_step`` of them a batch repeats some.

        Raises:
            UserError: there are no examples.
        """
        if not examples:
            raise UserError("data.train: there is no prompt to train on")
        self.examples = examples
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.examples)))
        random.Random(f"prompts/{self.seed}/{epoch}").shuffle(order)
        return order

    def at(self, place: int) -> Item:
        """Return the example at a place of the endless order, from 0."""
        epoch, index = divmod(place, len(self.examples))
        return self.examples[self._order(epoch)[index]]


class MixedStream(Stream[Item]):
    """Several tasks' examples, mixed: each task's in the order of a `PromptStream`, each as often as its share says.

    The next prompt is of the task that is furthest behind its share, so that after any number of prompts each task has
    had its share of them to within one (for two tasks; a little more for many). It has no state, as a `PromptStream`.
    """

    def __init__(self, streams: Sequence[PromptStream[Item]], shares: Sequence[float], prompts_per_step: int) -> None:
        """Keep the streams.

        Args:
            streams: of each task.
            shares: of the tasks in the prompts; they add up to 1.
            prompts_per_step: prompts of a step, of all tasks.
        """
        self.streams, self.shares, self.prompts_per_step = streams, shares, prompts_per_step
        self._turns = array("H")  # the task of each prompt so far
        self._places = array("Q")  # and its number among that task's
        self._counts = [0] * len(shares)

    def at(self, place: int) -> Item:
        """Return the example at a place of the endless order, from 0."""
        self._continue(place + 1)
        return self.streams[self._turns[place]].at(self._places[place])

    def _continue(self, until: int) -> None:
        for number in range(len(self._turns), until):
            behind = [share * (number + 1) - had for share, had in zip(self.shares, self._counts, strict=True)]
            task = behind.index(max(behind))
            self._turns.append(task)
            self._places.append(self._counts[task])
            self._counts[task] += 1
