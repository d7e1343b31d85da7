"""Which prompts a step samples, where that depends on what came of earlier ones. No torch here."""

from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

from lowmem_rlhf.data.stream import Stream

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """Draws prompts in the order of a stream, and leaves out for a while those that taught nothing.

    Args:
        stream: the order of the prompts.
        examples: all of them; a checkpoint knows them by their place here. Of a streamed set those of the first window,
            as none is set aside there.
        set_aside_steps: steps for which a prompt without a difference between its completions is left out; 0: none is.
    """

    def __init__(self, stream: Stream[Item], examples: Sequence[Item], set_aside_steps: int = 0) -> None:
        self.stream, self.set_aside_steps = stream, set_aside_steps
        self._numbers: dict[Hashable, int] = {id(one): number for number, one in enumerate(examples)}
        self._drawn = 0  # places of the stream that have had their turn
        self._back: dict[int, int] = {}  # by number, the step from which a prompt has its turn again

    def take(self, count: int, step: int) -> list[Item]:
        """Return the next prompts. Where all are set aside, they have their turn all the same."""
        taken: list[Item] = []
        passed_over = 0
        while len(taken) < count:
            example = self.stream.at(self._drawn)
            self._drawn += 1
            if passed_over < len(self._numbers) and self._back.get(self._numbers.get(id(example), -1), 0) > step:
                passed_over += 1
            else:
                taken.append(example)
        return taken

    def set_aside(self, examples: Sequence[Item], step: int) -> None:
        """Leave these out of the steps after this one, as many as `set_aside_steps` says."""
        self._back = {number: back for number, back in self._back.items() if back > step + 1}
        if self.set_aside_steps:
            self._back |= {self._numbers[id(one)]: step + 1 + self.set_aside_steps for one in examples}

    @property
    def aside(self) -> int:
        """How many prompts are left out at the moment."""
        return len(self._back)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; fit for JSON."""
        return {"drawn": self._drawn, "back": [[number, back] for number, back in self._back.items()]}

    def load_state(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on from what `state` gave; None: of a run that has drawn its prompts in turn up to this step."""
        self._drawn = step * self.stream.prompts_per_step if state is None else int(state["drawn"])
        self._back = {} if state is None else {int(number): int(back) for number, back in state["back"]}
