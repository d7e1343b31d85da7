"""Examples of a set that is never held as a whole: read in windows of so many rows, each of which is shuffled.

Which example has which place follows from the seed alone, so a resumed run sees what an uninterrupted one would have.
No torch here.
"""

import random
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from typing import Any, TypeVar

from lowmem_rlhf.data.bad_rows import RowReport
from lowmem_rlhf.data.sources import SplitRows, holds_out, may_learn, row_stream
from lowmem_rlhf.data.stream import Stream
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.progress import message
from lowmem_rlhf.recipe.sections import DataConfig

Item = TypeVar("Item")
Window = Callable[[int], "list[Item] | None"]  # the examples of the window of this number; None behind the last one

_HELD = 2  # windows, as a step may take from the end of one and the beginning of the next


class Windows:
    """The training rows of a streamed source, a window of `data.shuffle_buffer` at a time.

    Rows with the prompt of a held-out row are left out of their window.

    Args:
        data: of the recipe.
        rows: the first window and the held-out rows.
    """

    def __init__(self, data: DataConfig, rows: SplitRows) -> None:
        self._data, self._columns = data, dict.fromkeys(name for row in rows.train for name in row)
        self._keeps = may_learn(data, rows.held_out)
        self._stream, self._front = row_stream(data, "train"), data.eval_size if holds_out(data) else 0
        self._next = -1  # the window that these rows begin with
        self._rows: Iterator[Row] = iter(())

    def window(self, number: int) -> list[Row] | None:
        """Return the rows of a window, perhaps none, with at least the columns of the first; None behind the last one.

        Windows that follow one another are read on; for any other the rows before it are skipped.

        Raises:
            UserError: a file cannot be read.
        """
        size = self._data.shuffle_buffer
        if number != self._next:
            self._rows = self._stream.rows(self._front + number * size)
        self._next = -1  # where reading fails
        rows = list(islice(self._rows, size))
        self._next = number + 1
        if not rows:
            return None
        return [Row({**self._columns, **row}, row.number) for row in rows if self._keeps(row)]


class Streamed(Sequence[Item]):
    """The examples of the first window, and how those of the others are had."""

    def __init__(self, first: Sequence[Item], window: "Window[Item]") -> None:
        self._first, self.window = first, window

    def __len__(self) -> int:
        """Return the number of examples in the first window."""
        return len(self._first)

    def __getitem__(self, place: Any) -> Any:
        """Return an example of the first window."""
        return self._first[place]


def examples_in(
    windows: Windows, data: DataConfig, examples_of: Callable[[list[Row], RowReport], list[Item]]
) -> "Window[Item]":
    """Return what gives the examples of a window.

    Rows that are left out are counted, and told when they are ten times as many as before; those of the first window
    were told when it was checked.

    Args:
        examples_of: makes examples of rows, noting in the report those that it leaves out.
    """
    counted: dict[int, int] = {}  # left out, by window
    due = 1

    def window(number: int) -> list[Item] | None:
        nonlocal due
        rows = windows.window(number)
        if rows is None:
            return None
        report = RowReport(data, collect=True)
        examples = examples_of(rows, report)
        counted[number] = sum(one["count"] for one in report.left_out())
        if (left_out := sum(counted.values())) >= due:
            due = 10 ** len(str(left_out))
            if number:
                first = next(iter(report.left_out()), None)
                why = f" (one: row {first['row']}: {first['example']})" if first else ""
                message(f"data.streaming: {left_out:,} rows are left out so far{why}")
        return examples

    return window


class WindowStream(Stream[Item]):
    """The endless order of a streamed set: window by window, each shuffled anew in each epoch."""

    def __init__(self, window: "Window[Item]", prompts_per_step: int, seed: int) -> None:
        """Keep what reads a window; nothing is read yet."""
        self._window, self.prompts_per_step, self.seed = window, prompts_per_step, seed
        self._ends: list[int] = []  # examples up to the end of each window
        self._whole = False  # whether these are all windows
        self._held: OrderedDict[int, list[Item]] = OrderedDict()
        self._order = lru_cache(maxsize=2 * _HELD)(self._shuffled)

    def at(self, place: int) -> Item:
        """Return the example at a place of the endless order, from 0.

        Raises:
            UserError: there are no examples, or a file cannot be read.
            RunError: the source is not what it was.
        """
        ends = self._ends
        while not self._whole and place >= (ends[-1] if ends else 0):
            self._read(len(ends))
        if not ends or not ends[-1]:
            raise UserError("data.train: all rows are left out, so none is left to learn from")
        epoch, index = divmod(place, ends[-1]) if self._whole else (0, place)
        number = bisect_right(ends, index)
        examples = self._held[number] if number in self._held else self._read(number)
        return examples[self._order(epoch, number)[index - (ends[number] - self._count(number))]]

    def _count(self, number: int) -> int:
        return self._ends[number] - (self._ends[number - 1] if number else 0)

    def _shuffled(self, epoch: int, number: int) -> list[int]:
        order = list(range(self._count(number)))
        random.Random(f"window/{self.seed}/{epoch}/{number}").shuffle(order)
        return order

    def state(self) -> dict[str, Any]:
        """Return how many examples the windows have, which a resumed run then need not read to find its place."""
        return {"kept": [self._count(number) for number in range(len(self._ends))], "whole": self._whole}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` gave, as far as it is not known; None: of a run that has kept none."""
        if state is not None and len(state["kept"]) >= len(self._ends) and not self._whole:
            self._ends, self._whole = list(accumulate(map(int, state["kept"]))), bool(state["whole"])

    def _read(self, number: int) -> list[Item]:
        examples = self._window(number)
        if examples is None and number == len(self._ends):
            self._whole = True
            return []
        if examples is None or (number < len(self._ends) and len(examples) != self._count(number)):
            raise RunError(
                "data.train: the file or data set has changed since this run read it: other rows are there now; put it "
                "back and go on with --resume, or start a new run"
            )
        if number == len(self._ends):
            self._ends.append(len(examples) + (self._ends[-1] if self._ends else 0))
        self._held[number] = examples
        while len(self._held) > _HELD:
            self._held.popitem(last=False)
        return examples
