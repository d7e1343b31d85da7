"""The logged samples of a run: found, sorted and read from the disk as they are asked for.

What is kept of a sample are the numbers that it is found and sorted by; texts stay in the file.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.page.columns import short
from lowmem_rlhf.page.lines import GrowingLog, Missing, open_file, row_of
from lowmem_rlhf.run.held_out import number
from lowmem_rlhf.suggest import did_you_mean

MOST_ROWS = 200  # of an answer
MOST_TEXT = 20_000  # characters of a text in an answer; what is left out is said at its end
_NAN = math.nan
_OWN = ("step", "task", "prompt", "completion", "rewards", "advantage", "tokens", "truncated")

Weights = Callable[[str, str], float]  # (task, reward) -> weight; the task is an empty text where there are none


@dataclass(frozen=True)
class Wanted:
    """Which samples, in which order; see `source.RunSource.samples`.

    Raises:
        UserError: there is no such order.
    """

    text: str = ""
    task: str | None = None
    low: float | None = None
    high: float | None = None
    reward: str | None = None
    first: int | None = None
    last: int | None = None
    truncated: bool | None = None
    sort: str = "newest"

    def __post_init__(self) -> None:
        """Check the order."""
        if self.sort not in SORTS:
            raise UserError(f"sort: got {self.sort!r}{did_you_mean(self.sort, SORTS)}; give one of {', '.join(SORTS)}")


SORTS = ("newest", "oldest", "highest", "lowest", "longest", "shortest")


class SamplesLog:
    """samples.jsonl, followed. A sample's index is its place among the rows that can be read, from 0."""

    def __init__(self, path: Path, weight: Weights) -> None:
        self._log, self._weight = GrowingLog(path), weight
        self._clear()

    def _clear(self) -> None:
        self._offsets, self._steps, self._prompts = array("q"), array("q"), array("q")
        self._length, self._total, self._truncated = array("d"), array("d"), array("b")
        self._tasks, self._task_of = [""], array("l")
        self._rewards: dict[str, array[float]] = {}
        self._found: tuple[Any, list[int]] | None = None  # of the last question

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self._offsets)

    @property
    def rewards(self) -> list[str]:
        """The names of the rewards that samples have."""
        return list(self._rewards)

    @property
    def tasks(self) -> list[str]:
        """The tasks that samples are of."""
        return self._tasks[1:]

    def refresh(self) -> None:
        """Read what is new.

        Raises:
            UserError: the file cannot be read.
        """
        if self._log.begins_anew():
            self._clear()
        for offset, line in self._log.new_lines():
            if (row := row_of(line)) is not None:
                with suppress(RecursionError):  # nested so deeply that it is none of ours
                    self._add(offset, row, _prompt_key(row.get("prompt")))

    def _add(self, offset: int, row: dict[str, Any], prompt: int) -> None:
        rewards, task, place = _rewards_of(row), _task_of(row), len(self._offsets)
        if task not in self._tasks:
            self._tasks.append(task)
        self._task_of.append(self._tasks.index(task))
        for name, value in rewards.items():
            if name not in self._rewards:
                self._rewards[name] = array("d", [_NAN]) * place
            self._rewards[name].append(_NAN if value is None else value)
        self._offsets.append(offset)
        self._steps.append(_step_of(row))
        self._prompts.append(prompt)
        self._length.append(_length_of(row))
        self._truncated.append(bool(row.get("truncated")))
        self._total.append(_NAN if (total := self._sum(task, rewards)) is None else total)
        for column in self._rewards.values():
            if len(column) == place:
                column.append(_NAN)

    def _sum(self, task: str, rewards: dict[str, float | None]) -> float | None:
        known = {name: value for name, value in rewards.items() if value is not None}
        return math.fsum(self._weight(task, name) * value for name, value in known.items()) if known else None

    def find(self, wanted: Wanted, offset: int = 0, limit: int = 50) -> dict[str, Any]:
        """Return ``total``, ``all`` and ``rows`` (see `source.RunSource.samples`).

        Raises:
            UserError: there is no such reward.
        """
        key = (wanted, len(self), self._log.end)
        if self._found is None or self._found[0] != key:
            self._found = key, self._sorted(wanted, self._matching(wanted))
        places = self._found[1]
        return {
            "total": len(places),
            "all": len(self),
            "rows": self._shown(places[offset : offset + min(limit, MOST_ROWS)]),
        }

    def same_prompt(self, index: int, limit: int = 40) -> dict[str, Any]:
        """Return ``total`` and ``rows`` of one prompt's samples, oldest first; of too many the first and the last ones.

        Raises:
            Missing: there is no such sample.
        """
        if not 0 <= index < len(self):
            there = f"they are 0 to {len(self) - 1}" if len(self) else "there are none yet"
            raise Missing(f"index: there is no sample {index}; {there}")
        places = [place for place, key in enumerate(self._prompts) if key == self._prompts[index]]
        total, limit = len(places), max(2, min(limit, MOST_ROWS))
        if total > limit:
            places = [*places[: limit - limit // 2], *places[-(limit // 2) :]]
        return {"total": total, "rows": self._shown(places)}

    def _matching(self, wanted: Wanted) -> list[int]:
        values = self._values(wanted)
        task = None if wanted.task is None else self._tasks.index(wanted.task) if wanted.task in self._tasks else -1
        places = [
            place
            for place, step in enumerate(self._steps)
            if (wanted.first is None or step >= wanted.first)
            and (wanted.last is None or step <= wanted.last)
            and (task is None or self._task_of[place] == task)
            and (wanted.truncated is None or bool(self._truncated[place]) is wanted.truncated)
            and (wanted.low is None or values[place] >= wanted.low)  # no reward: never
            and (wanted.high is None or values[place] <= wanted.high)
        ]
        if not (text := wanted.text.casefold()):
            return places
        return [place for place, row in self._read(places) if text in _searched(row)]

    def _values(self, wanted: Wanted) -> "array[float]":
        if wanted.reward is None:
            return self._total
        if wanted.reward not in self._rewards:
            names = ", ".join(self._rewards) or "none"
            raise UserError(
                f"reward: got {wanted.reward!r}{did_you_mean(wanted.reward, self._rewards)}; there is {names}"
            )
        return self._rewards[wanted.reward]

    def _sorted(self, wanted: Wanted, places: list[int]) -> list[int]:
        """Sort; of equals, and of those without a number, the newest first, the latter at the end."""
        if wanted.sort in ("newest", "oldest"):
            return places[::-1] if wanted.sort == "newest" else places
        values = self._values(wanted) if wanted.sort in ("highest", "lowest") else self._length
        sign = -1 if wanted.sort in ("highest", "longest") else 1
        return sorted(
            places, key=lambda p: (values[p] != values[p], sign * values[p] if values[p] == values[p] else 0, -p)
        )

    def _read(self, places: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows at some places; one that is no longer there is left out."""
        if not places:
            return
        try:
            with open_file(self._log.path) as file:
                for place in places:
                    file.seek(self._offsets[place])
                    if (row := row_of(file.readline())) is not None:
                        yield place, row
        except OSError as error:
            raise Missing(f"{self._log.path} cannot be read: {error.strerror or error}") from error

    def _shown(self, places: list[int]) -> list[dict[str, Any]]:
        return [self._told(place, row) for place, row in self._read(places)]

    def _told(self, place: int, row: dict[str, Any]) -> dict[str, Any]:
        rewards, task = _rewards_of(row), _task_of(row)
        told = {
            "index": place,
            "step": _step_of(row),
            "task": task or None,
            "prompt": _cut(row.get("prompt", "")),
            "completion": _cut(_text(row.get("completion", ""))),
            "rewards": rewards,
            "reward": self._sum(task, rewards),
            "advantage": number(row.get("advantage")),
            "tokens": None if (tokens := number(row.get("tokens"))) is None else short(tokens),
            "truncated": row.get("truncated") if isinstance(row.get("truncated"), bool) else None,
        }
        more = {str(name): _cut(value) for name, value in row.items() if name not in _OWN}
        return {**told, "more": more} if more else told


def _rewards_of(row: dict[str, Any]) -> dict[str, float | None]:
    rewards = row.get("rewards")
    return {str(name): number(value) for name, value in rewards.items()} if isinstance(rewards, dict) else {}


def _task_of(row: dict[str, Any]) -> str:
    return task if isinstance(task := row.get("task"), str) else ""


def _step_of(row: dict[str, Any]) -> int:
    step = number(row.get("step"))
    return int(step) if step is not None and abs(step) < 2**62 else 0


def _length_of(row: dict[str, Any]) -> float:
    tokens = number(row.get("tokens"))
    return float(len(_text(row.get("completion", "")))) if tokens is None else tokens


def _prompt_key(prompt: Any) -> int:
    digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _searched(row: dict[str, Any]) -> str:
    """Return what of a sample is searched: all texts of its prompt, and its completion."""
    prompt = row.get("prompt", "")
    turns = prompt if isinstance(prompt, list) and prompt else [prompt]
    texts = [turn.get("content", "") if isinstance(turn, dict) else turn for turn in turns]
    return "\n".join(map(_text, [*texts, row.get("completion", "")])).casefold()


def _cut(value: Any, depth: int = 12) -> Any:
    """Return a value with its long texts, and what is nested too deeply, cut."""
    if isinstance(value, str):
        left_out = len(value) - MOST_TEXT
        return value if left_out <= 0 else f"{value[:MOST_TEXT]} ... ({left_out:,} more characters)"
    if isinstance(value, list | dict) and not depth:
        return "..."
    if isinstance(value, list):
        return [_cut(one, depth - 1) for one in value]
    if isinstance(value, dict):
        return {str(key): _cut(one, depth - 1) for key, one in value.items()}
    return value
