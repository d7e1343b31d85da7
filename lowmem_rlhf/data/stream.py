"""The order in which training sees its prompts, pairs or other examples. No torch here."""

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

from lowmem_rlhf.errors import UserError

Item = TypeVar("Item")


class PromptStream(Generic[Item]):
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

    def batch(self, step: int) -> list[Item]:
        """Return the ``prompts_per_step`` examples of a step, counted from 0."""
        first = step * self.prompts_per_step
        places = (divmod(first + offset, len(self.examples)) for offset in range(self.prompts_per_step))
        return [self.examples[self._order(epoch)[index]] for epoch, index in places]
