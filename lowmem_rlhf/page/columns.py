"""The metrics of a run as columns: every step while they are few, then means of neighbours with their range.

However long a run is, what is kept of it is bounded: at most twice `MOST` buckets of each metric, and 16 bytes a step
that say where its line begins.
"""

import math
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_rlhf.page.lines import GrowingLog, open_file, row_of
from lowmem_rlhf.run.held_out import number

MOST = 2000  # points of an answer
_NAN = math.nan
_LARGEST = sys.float_info.max  # NaN is not below it, and no infinity


class _Column:
    """Sum, count, least and greatest value of a metric in each bucket."""

    def __init__(self, empty: int) -> None:
        nothing = [_NAN] * empty
        self.total, self.low, self.high = array("d", [0.0]) * empty, array("d", nothing), array("d", nothing)
        self.count = array("q", [0]) * empty

    def append(self, values: list[float]) -> None:
        self.total.append(sum(values))
        self.count.append(len(values))
        self.low.append(min(values, default=_NAN))
        self.high.append(max(values, default=_NAN))

    def joined(self, factor: int) -> "_Column":
        """Return the column with so many neighbours in one."""
        if factor == 1:
            return self
        missing = -len(self.total) % factor
        nothing = [_NAN] * missing

        def groups(values: Any, end: list[float]) -> Any:  # (buckets, factor)
            return np.concatenate([np.asarray(values), np.array(end, dtype=values.typecode)]).reshape(-1, factor)

        wider = _Column(0)
        wider.total = array("d", groups(self.total, [0.0] * missing).sum(axis=1).tobytes())
        wider.count = array("q", groups(self.count, [0] * missing).sum(axis=1).tobytes())
        wider.low = array("d", np.fmin.reduce(groups(self.low, nothing), axis=1).tobytes())
        wider.high = array("d", np.fmax.reduce(groups(self.high, nothing), axis=1).tobytes())
        return wider

    def means(self) -> list[float | int | None]:
        return [short(total / count) if count else None for total, count in zip(self.total, self.count, strict=True)]


class Buckets:
    """Rows of metrics, gathered: one a bucket at first; whenever there are too many, two neighbours become one."""

    def __init__(self) -> None:
        self.width = 1  # rows of a bucket
        self._first, self._last = array("q"), array("q")  # the steps of a bucket
        self._columns: dict[str, _Column] = {}
        self._waiting: list[tuple[int, dict[str, float]]] = []  # rows of the bucket that is not full

    def add(self, row: dict[str, Any]) -> None:
        """Add the row of the next step."""
        numbers = {name: value for name, value in row.items() if type(value) in (float, int) and abs(value) <= _LARGEST}
        self._waiting.append((numbers.pop("step"), numbers))
        if len(self._waiting) == self.width:
            self._close()
            if len(self._first) == 2 * MOST:
                self._widen()

    def _close(self) -> None:
        rows = [numbers for _, numbers in self._waiting]
        for name in {name: None for numbers in rows for name in numbers}:
            if name not in self._columns:
                self._columns[name] = _Column(len(self._first))
            self._columns[name].append([numbers[name] for numbers in rows if name in numbers])
        self._first.append(self._waiting[0][0])
        self._last.append(self._waiting[-1][0])
        self._waiting = []
        for column in self._columns.values():
            if len(column.total) < len(self._first):
                column.append([])

    def _widen(self) -> None:
        self.width *= 2
        self._first, self._last = self._first[::2], self._last[1::2]
        self._columns = {name: column.joined(2) for name, column in self._columns.items()}

    def told(self, points: int) -> dict[str, Any]:
        """Return ``step`` and ``columns``; where a point is of several steps, their ``low`` and ``high``, too.

        Args:
            points: the most.
        """
        if self._waiting:
            whole = self._copy()
            whole._close()
            return whole.told(points)
        factor = 1
        while -(-len(self._first) // factor) > points:
            factor *= 2
        ends = zip(self._first[::factor], _last_of_each(self._last, factor), strict=True)
        columns = {name: column.joined(factor) for name, column in self._columns.items()}
        told: dict[str, Any] = {
            "step": [(first + last) // 2 for first, last in ends],
            "columns": {name: column.means() for name, column in columns.items()},
        }
        if factor * self.width > 1:
            told["low"] = {name: [short(value) for value in column.low] for name, column in columns.items()}
            told["high"] = {name: [short(value) for value in column.high] for name, column in columns.items()}
        return told

    def _copy(self) -> "Buckets":
        twin = Buckets()
        twin.width, twin._waiting = self.width, list(self._waiting)
        twin._first, twin._last = self._first[:], self._last[:]
        for name, column in self._columns.items():
            own = twin._columns[name] = _Column(0)
            own.total, own.count = column.total[:], column.count[:]
            own.low, own.high = column.low[:], column.high[:]
        return twin


def _last_of_each(values: "array[int]", factor: int) -> list[int]:
    return [values[min(begin + factor, len(values)) - 1] for begin in range(0, len(values), factor)]


def short(value: float) -> float | int | None:
    """Return a number with seven digits, whole ones exactly; None for one that is not finite."""
    if not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.7g}")


class MetricsLog:
    """metrics.jsonl, followed. A line that is damaged, or whose step is not above the one before, is left out.

    Attributes:
        seconds: that the steps took.
        taken_back: how often the log began anew, as when a run goes on from an earlier checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._log = GrowingLog(path)
        self.taken_back = 0
        self._clear()

    def _clear(self) -> None:
        self._steps, self._offsets = array("q"), array("q")
        self._all = Buckets()
        self.seconds = 0.0

    @property
    def last(self) -> int:
        """The last step that was read; 0 before there is one."""
        return self._steps[-1] if self._steps else 0

    def refresh(self) -> None:
        """Read what is new.

        Raises:
            UserError: the file cannot be read.
        """
        if self._log.begins_anew():
            self._clear()
            self.taken_back += 1
        for offset, line in self._log.new_lines():
            if (row := _step_row(line)) is not None and row["step"] > self.last:
                self._steps.append(row["step"])
                self._offsets.append(offset)
                self._all.add(row)
                self.seconds += number(row.get("time/step")) or 0.0

    def columns(self, since: int = 0, points: int = 1000) -> dict[str, Any]:
        """Return the columns of the steps above ``since`` (see `source.RunSource.columns`)."""
        points = min(points, MOST)
        if since < (self._steps[0] if self._steps else 0):
            told = self._all.told(points)
        else:
            later = Buckets()
            for row in self._rows_after(since):
                later.add(row)
            told = later.told(points)
        return {**told, "last": self.last, "taken_back": self.taken_back}

    def _rows_after(self, since: int) -> Iterator[dict[str, Any]]:
        place = bisect_right(self._steps, since)
        if place == len(self._steps):
            return
        with open_file(self._log.path) as file:
            file.seek(self._offsets[place])
            while file.tell() < self._log.end and (line := file.readline()):
                if (row := _step_row(line)) is not None and row["step"] > since:
                    since = row["step"]
                    yield row


def _step_row(line: bytes) -> dict[str, Any] | None:
    row = row_of(line)
    step = None if row is None else row.get("step")
    return row if isinstance(step, int) and not isinstance(step, bool) and 0 < step < 2**62 else None
