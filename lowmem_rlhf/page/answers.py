"""What the page may ask, and what it is answered: paths and parameters in, JSON values out. No HTTP here."""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.page.chat import Chat
from lowmem_rlhf.page.columns import MOST
from lowmem_rlhf.page.followed import Followed
from lowmem_rlhf.page.lines import Missing
from lowmem_rlhf.page.samples import MOST_ROWS
from lowmem_rlhf.page.source import RunSource
from lowmem_rlhf.suggest import did_you_mean

_MOST_STEP = 2**53  # whole numbers that JavaScript has
_MOST_TEXT = 1000  # characters of a parameter


def answer(followed: Followed, path: str, query: str) -> Any:
    """Return what a GET below ``/api/`` is answered.

    Args:
        path: ``/api/runs``, ``/api/run/ID``, or ``columns``, ``samples`` or ``same_prompt`` below the latter.
        query: behind the ``?``; the parameters are those of `RunSource`'s functions. An empty one is not given.

    Raises:
        Missing: there is no such path, run or sample.
        UserError: a parameter is wrong.
    """
    asked = Asked(query)
    if path == "/api/runs":
        asked.end()
        return followed.list()
    source, what = found(followed, path)
    if what not in _ANSWERS:
        raise Missing(f"there is no {path!r}; below a run there are {', '.join(filter(None, _ANSWERS))} and chat")
    return _ANSWERS[what](source, asked)


def talk(followed: Followed, chat: Chat, path: str, body: Any) -> Any:
    """Return what a POST to ``/api/run/ID/chat`` is answered (see `Chat.ask`).

    Raises:
        Missing, UserError, RunError: as `Chat.ask`.
    """
    source, what = found(followed, path)
    if what != "chat":
        raise Missing(f"nothing can be posted to {path!r}; only chat below a run takes something")
    if not isinstance(body, dict):
        raise UserError('the body should be a JSON object, as {"prompt": "..."}')
    if unknown := [key for key in body if key not in ("prompt", "task")]:
        raise UserError(f"the body has {unknown[0]!r}; it takes prompt and task")
    return chat.ask(source, body.get("prompt"), body.get("task"))


def found(followed: Followed, path: str) -> tuple[RunSource, str]:
    """Return the run that a path names, and what is below it.

    Raises:
        Missing: there is no such run, or path.
    """
    parts = path.split("/")
    if parts[:3] != ["", "api", "run"] or len(parts) not in (4, 5):
        raise Missing(f"there is no {path!r}; there are /api/runs, /api/run/ID and /api/gpu")
    return followed.source(parts[3]), "".join(parts[4:])


class Asked:
    """The parameters of a question, each taken out once.

    Raises:
        UserError: they cannot be read, or one is there twice.
    """

    def __init__(self, query: str) -> None:
        try:
            pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=40)
        except ValueError as error:
            raise UserError(f"the parameters cannot be read: {error}") from error
        self._left: dict[str, str] = {}
        for name, value in pairs:
            if name in self._left:
                raise UserError(f"{name}: it is given twice; give it once")
            if len(value) > _MOST_TEXT:
                raise UserError(f"{name}: it has {len(value):,} characters; at most {_MOST_TEXT:,} are taken")
            self._left[name] = value
        self._known: list[str] = []

    def text(self, name: str) -> str | None:
        """Return a parameter as it was written; None where it is empty or not given."""
        self._known.append(name)
        return self._left.pop(name, "") or None

    def whole(self, name: str, default: int | None, low: int, high: int = _MOST_STEP) -> Any:
        """Return a whole number within bounds."""
        if (text := self.text(name)) is None:
            return default
        if not text.removeprefix("-").isdecimal() or not low <= int(text) <= high:
            raise UserError(f"{name}: got {text!r}; it should be a whole number from {low} to {high}")
        return int(text)

    def number(self, name: str) -> float | None:
        """Return a finite number."""
        if (text := self.text(name)) is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{name}: got {text!r}; it should be a number")
        return value

    def flag(self, name: str) -> bool | None:
        """Return true or false."""
        if (text := self.text(name)) is None:
            return None
        if text not in ("true", "false"):
            raise UserError(f"{name}: got {text!r}; it should be true or false")
        return text == "true"

    def end(self) -> None:
        """Check that nothing is left that nobody takes.

        Raises:
            UserError: there is.
        """
        if self._left:
            name, known = next(iter(self._left)), ", ".join(self._known) or "none"
            raise UserError(f"there is no parameter {name!r}{did_you_mean(name, self._known)}; there is {known}")


def _describe(source: RunSource, asked: Asked) -> Any:
    asked.end()
    return source.describe()


def _columns(source: RunSource, asked: Asked) -> Any:
    since, points = asked.whole("since", 0, 0), asked.whole("points", 1000, 1, MOST)
    asked.end()
    return source.columns(since, points)


def _samples(source: RunSource, asked: Asked) -> Any:
    given: dict[str, Any] = {
        "text": asked.text("text") or "",
        **{name: asked.text(name) for name in ("task", "reward")},
        **{name: asked.number(name) for name in ("low", "high")},
        **{name: asked.whole(name, None, 0) for name in ("first", "last")},
        "truncated": asked.flag("truncated"),
        "sort": asked.text("sort") or "newest",
        "offset": asked.whole("offset", 0, 0),
        "limit": asked.whole("limit", 50, 0, MOST_ROWS),
    }
    asked.end()
    return source.samples(**given)


def _same_prompt(source: RunSource, asked: Asked) -> Any:
    index, limit = asked.whole("index", None, 0), asked.whole("limit", 40, 2, MOST_ROWS)
    asked.end()
    if index is None:
        raise UserError("index: it is missing; give a sample's index")
    return source.same_prompt(index, limit)


_ANSWERS: Mapping[str, Any] = {
    "": _describe,
    "columns": _columns,
    "samples": _samples,
    "same_prompt": _same_prompt,
}
