"""Rows that cannot be learned from: counted by reason and refused together, or left out. What is worth saying of rows.

No torch here.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lowmem_rlhf.data.values import Row, numbered
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.recipe.sections import DataConfig

logger = logging.getLogger(__name__)


_CHUNK = 1000  # rows that are written and tokenized at once


class RowError(UserError):
    """A row that cannot be learned from.

    Args:
        reason: what kind of fault it is, in a few words; rows are counted by it.
        text: what is wrong with this row and what to do, without the row's number.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass
class LongRows:
    """Rows with more tokens than a limit.

    Attributes:
        limit, key: the most tokens, and the recipe key that says so.
        noun: what a row makes: prompt, example, pair.
        lengths: tokens of every row that was looked at, by the row's number.
    """

    limit: int
    key: str
    noun: str
    lengths: list[tuple[int, int]] = field(default_factory=list)

    @property
    def above(self) -> list[tuple[int, int]]:
        """The rows above the limit: number and tokens."""
        return [(number, length) for number, length in self.lengths if length > self.limit]


class RowReport:
    """What is found out about rows while they are made into examples.

    Args:
        data: says whether bad rows are errors or left out.
        source: the file or data set, for messages; empty: not named.
        collect: keep what is found for whoever asks: `finish` neither raises nor says anything.
        before: of the training rows, where these are held out: what is noted of those is not said again.
    """

    def __init__(
        self, data: DataConfig, source: str = "", collect: bool = False, before: "RowReport | None" = None
    ) -> None:
        self._data, self._source, self._collect = data, source, collect
        self._before = before
        self.rows = self.kept = 0
        self.answers: list[int] = []  # of each conversation that is learned from
        self.bad: dict[str, list[tuple[int, str]]] = {}
        self.notes: dict[str, list[int]] = {}
        self.long: LongRows | None = None
        self.learn_all = False
        self.spoken: RowReport | None = None  # of an earlier reading of these rows
        self.progress: ProgressCallback | None = None  # called with (rows done, rows in all)

    def each(self, rows: Iterable[Mapping[str, Any]]) -> list[Row]:
        """Return the rows, numbered, and remember how many they are."""
        numbered_rows = numbered(rows)
        self.rows = len(numbered_rows)
        return numbered_rows

    def chunks(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Yield the rows a thousand at a time; what is done with a chunk counts as progress."""
        for start in range(0, len(rows), _CHUNK):
            yield rows[start : start + _CHUNK]
            if self.progress is not None:
                self.progress(min(start + _CHUNK, len(rows)), len(rows))

    def again(self) -> "RowReport":
        """Return a report for the same rows, read once more for something else: what was said is not said again."""
        report = RowReport(self._data, self._source, before=self._before)
        report.spoken = self
        return report

    @contextmanager
    def row(self, number: int) -> Iterator[None]:
        """Work on a row inside the block; a `RowError` in it is counted, and ends the block alone."""
        try:
            yield
        except RowError as error:
            self.bad.setdefault(error.reason, []).append((number, str(error)))

    def note(self, text: str, number: int) -> None:
        """Remember something about a row that is said once for all rows, with the number of the first."""
        rows = self.notes.setdefault(text, [])
        if number not in rows[-1:]:
            rows.append(number)

    def fits(self, number: int, length: int, limit: int, key: str, noun: str) -> bool:
        """Return whether a row has at most ``limit`` tokens; a longer one is counted."""
        self.long = self.long or LongRows(limit, key, noun)
        self.long.lengths.append((number, length))
        return length <= limit

    def finish(self, kept: int) -> None:
        """Say what was left out and what was noted.

        Args:
            kept: rows that something is learned from.

        Raises:
            UserError: there are bad rows and they are not to be left out (all reasons in one message), or none is left.
        """
        self.kept = kept
        if self._collect:
            return
        self.check()
        earlier = self.spoken
        if (lines := self.left_out_lines()) and (earlier is None or lines != earlier.left_out_lines()):
            logger.warning("%s", "\n  ".join(lines))
        for line in self.said():
            if earlier is None or line not in earlier.said():
                logger.warning("%s", line)

    def check(self) -> None:
        """Raise the error of `finish`, if there is one."""
        errors = self._errors()
        if errors:
            raise UserError(errors[0] if len(errors) == 1 else "\n  ".join([self._head(len(errors)), *errors]))
        if self.rows and not self.kept:
            raise UserError(self._none_left())

    def left_out(self) -> list[dict[str, Any]]:
        """Return the reasons with their number of rows, the first row's number and what is wrong with it."""
        reasons = [
            {"reason": reason, "count": len(rows), "row": rows[0][0], "example": rows[0][1]}
            for reason, rows in self.bad.items()
        ]
        if self.long and (above := self.long.above):
            text = f"its {self.long.noun} has {above[0][1]} tokens, {self.long.key} is {self.long.limit}"
            reasons.append({"reason": "too long", "count": len(above), "row": above[0][0], "example": text})
        return reasons

    def said(self) -> list[str]:
        """Return a line for each thing that was noted, and one on conversations of several answers."""
        lines = []
        before = self._before
        if max(self.answers, default=0) > 1 and (before is None or max(before.answers, default=0) < 2):
            mean = f"{sum(self.answers) / len(self.answers):.3g}"
            lines.append(
                f"all answers are learned, {mean} a conversation"
                if self.learn_all
                else f"of {mean} answers a conversation the last is learned; sft.learn=all learns each"
            )
        return lines + [
            text + (f" ({len(rows)} of {self.rows} rows, first: row {rows[0]})" if rows[0] else "")
            for text, rows in self.notes.items()
            if before is None or text not in before.notes
        ]

    def left_out_lines(self) -> list[str]:
        """Return a line for each reason that rows are left out for, with a heading where there are several."""
        lines = [
            f"{len(rows)} of {self.rows} rows are left out, {reason} (first: {self._place(rows[0][0])}: {rows[0][1]})"
            for reason, rows in self.bad.items()
        ]
        if self.long and (above := self.long.above):
            noun, limit, (number, length) = self.long.noun, self.long.limit, above[0]
            lines.append(
                f"{len(above)} of {self.rows} {noun}s have more than {limit} tokens and are left out (first: "
                f"{self._place(number)}, {length} tokens)"
            )
        return lines if len(lines) < 2 else [f"{self.rows - self.kept} of {self.rows} rows are left out:", *lines]

    def _place(self, number: int) -> str:
        return f"row {number}{f' of {self._source}' if self._source else ''}"

    def _head(self, reasons: int) -> str:
        count = sum(map(len, self.bad.values())) + (len(self.long.above) if self.long else 0)
        return (
            f"{count} of {self.rows} rows cannot be learned from, for {reasons} reasons; set data.bad_rows=drop to "
            "leave them out:"
        )

    def _errors(self) -> list[str]:
        if self._data.bad_rows == "drop":
            return []
        faults = []
        for rows in self.bad.values():
            others = f" ({len(rows)} of {self.rows} rows are like that)" if len(rows) > 1 else ""
            drops = len(self.bad) == 1 and len(rows) < self.rows
            remedy = ", or set data.bad_rows=drop to leave such rows out" if drops else ""
            faults.append(f"{self._place(rows[0][0])}: {rows[0][1]}{others}{remedy}")
        if self.long and self._data.long_prompts == "error" and (above := self.long.above):
            one, most = self.long, max(length for _, length in above)
            faults.append(
                f"{self._place(above[0][0])}: its {one.noun} has {above[0][1]} tokens, {one.key} is {one.limit} "
                f"({len(above)} of {self.rows} {one.noun}s are above it, the longest has {most}); raise {one.key} to "
                f"{most}, or set data.long_prompts=drop"
            )
        return faults

    def _none_left(self) -> str:
        if self.long and not self.bad:
            one = self.long
            shortest = min(length for _, length in one.lengths)
            return (
                f"data.long_prompts: all {len(one.lengths)} {one.noun}s are above {one.key} ({one.limit} tokens; the "
                f"shortest has {shortest}), so none is left; raise {one.key}"
            )
        reasons = "; ".join(
            f"{one['count']} {one['reason']} (row {one['row']}: {one['example']})" for one in self.left_out()
        )
        which, use = ("rows", "learn from") if self._before is None else ("held-out rows", "measure")
        return f"data.bad_rows: all {self.rows} {which} are left out, so none is left to {use}: {reasons}"
