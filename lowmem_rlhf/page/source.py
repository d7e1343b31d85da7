"""What the page shows of a run, read from its directory while that grows. Nothing is written and no torch imported.

Texts of the run are as `report` shows them: secrets masked, and this user's home folder written as ``~``.
"""

import math
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

from lowmem_rlhf.display.format import format_bytes, format_measure, in_words, interval_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.page.columns import MetricsLog
from lowmem_rlhf.page.lines import Missing, last_row
from lowmem_rlhf.page.samples import SamplesLog, Wanted
from lowmem_rlhf.paths import without_home
from lowmem_rlhf.recipe.secrets import masked
from lowmem_rlhf.run.evaluations import EVALUATIONS, read_evaluations
from lowmem_rlhf.run.held_out import AFTER, BEFORE, STOPPED, during, headline, number, part
from lowmem_rlhf.run.listing import state_of
from lowmem_rlhf.run.reading import EVALUATION, INPUTS, METRICS, PLAN, RECIPE, SAMPLES, RunReader

_NAME = 60  # characters of a text that comes again and again


class RunSource:
    """A run, running or ended. Every answer is as new as the files are; several threads may ask."""

    def __init__(self, path: Path) -> None:
        """Wrap a run directory; nothing is read yet."""
        self.path = path
        self._reader, self._lock = RunReader(path), RLock()
        self._metrics = MetricsLog(path / METRICS)
        self._samples = SamplesLog(path / SAMPLES, self._weight)
        self._read: dict[Any, tuple[Any, Any]] = {}  # by file and reader: what the file was, and what was read of it

    def describe(self) -> dict[str, Any]:
        """Return everything but the logs.

        Returns:
            Those of `summary`, and ``seconds`` that its steps took; ``recipe``, the text of recipe.yaml; ``plan``,
            ``evaluation`` and ``later``, what plan.json, evaluation.json and evaluations.jsonl hold; ``environment``, a
            list of ``[name, value]`` in words; ``rewards`` and ``tasks``, their names; ``remarks``, a sentence for each
            file that cannot be read.

        Raises:
            Missing: the directory is no longer there.
        """
        with self._lock:
            told, remarks = self._summary()
            for log in (self._metrics, self._samples):
                try:
                    log.refresh()
                except UserError as error:
                    remarks.append(_Unread(error))
            plan, evaluation = self._file(PLAN, self._plan), self._file(EVALUATION, self._evaluation)
            later, text = self._file(EVALUATIONS, self._later), self._file(RECIPE, self._text)
            inputs = self._file(INPUTS, self._inputs)
            remarks += [one for one in (plan, later, text, inputs) if isinstance(one, _Unread)]
            tasks, weights = self._file(RECIPE, self._tasks_and_weights)
            names = {
                "rewards": list(dict.fromkeys([*(name for _, name in weights), *self._samples.rewards])),
                "tasks": list(dict.fromkeys([*filter(None, tasks), *self._samples.tasks])),
                "remarks": list(dict.fromkeys(map(str, remarks))),
            }
            return {
                **shown({**told, **names}),
                "seconds": self._metrics.seconds,
                "recipe": _or(text, ""),
                "plan": _or(plan, {}),
                "evaluation": _or(evaluation, {}),
                "later": _or(later, []),
                "environment": environment(_or(plan, {}), _or(inputs, {})),
            }

    def summary(self) -> dict[str, Any]:
        """Return what a list of runs shows, without reading the logs.

        Returns:
            ``name``, ``path``, ``algorithm``, ``model``, ``description``; ``state``: running, finished or stopped;
            ``step`` and ``max_steps`` (None: not known); ``device``, as torch names it (empty: not known); ``changed``,
            when it was last written, in seconds since 1970; ``headline`` of the held-out data (see `headline_of`), None
            where nothing was measured.

        Raises:
            Missing: the directory is no longer there.
        """
        with self._lock:
            return shown(self._summary()[0])

    def columns(self, since: int = 0, points: int = 1000) -> dict[str, Any]:
        """Return the metrics of the steps above ``since``.

        Args:
            since: 0 for all.
            points: the most (up to 2000). Of more steps, neighbours are put together.

        Returns:
            ``last``, the last step of the run; ``step``, a list; ``columns``, a list of numbers or None by metric. Of
            steps that were put together these are the means, ``step`` is the middle one, and ``low`` and ``high`` have
            the least and the greatest value. ``taken_back`` counts how often the log began anew (a resume from an
            earlier checkpoint): where it changes, all columns are to be asked for again. What evaluations measured
            while the run went on is in ``describe()["evaluation"]["during"]``: they end later than their step.

        Raises:
            Missing: the directory is no longer there.
        """
        with self._lock:
            self._check()
            self._metrics.refresh()
            told = self._metrics.columns(since, points)
            by_name = [part for part, value in told.items() if isinstance(value, dict)]
            return {**told, **{part: {_name(name): one for name, one in told[part].items()} for part in by_name}}

    def samples(
        self,
        text: str = "",
        task: str | None = None,
        low: float | None = None,
        high: float | None = None,
        reward: str | None = None,
        first: int | None = None,
        last: int | None = None,
        truncated: bool | None = None,
        sort: str = "newest",
        offset: int = 0,
        limit: int = 50,
    ) -> dict[str, Any]:
        """Return samples.

        Args:
            text: those that have it in a prompt or completion, in any case.
            task: those of this task.
            low, high: bounds of the reward, inclusive.
            reward: the reward that ``low``, ``high`` and ``sort`` look at; None: the sum.
            first, last: steps, inclusive.
            truncated: those that were cut at the longest length, or those that were not.
            sort: newest, oldest, highest, lowest, longest or shortest.
            offset, limit: which of those found.

        Returns:
            ``total``, how many were found; ``all``, how many there are; ``rows``, each with ``index``, ``step``,
            ``task``, ``prompt`` (a text or chat messages), ``completion``, ``rewards`` by name, ``reward`` (their sum
            with the recipe's weights, before gates and normalisation; None without any), ``advantage``, ``tokens``,
            ``truncated``, and ``more``, other values by name, where there are any.

        Raises:
            UserError: there is no such order or reward.
            Missing: the directory is no longer there.
        """
        wanted = Wanted(text, task, low, high, reward, first, last, truncated, sort)
        with self._lock:
            self._check()
            self._samples.refresh()
            return shown(self._samples.find(wanted, offset, limit))

    def same_prompt(self, index: int, limit: int = 40) -> dict[str, Any]:
        """Return ``rows``, the samples with the prompt of this one, oldest first, and ``total``, how many there are.

        Of more than ``limit`` the first half and the last half are returned; a row is as `samples` has it.

        Raises:
            Missing: there is no such sample, or the directory is no longer there.
        """
        with self._lock:
            self._check()
            self._samples.refresh()
            return shown(self._samples.same_prompt(index, limit))

    def _check(self) -> None:
        if not self._reader.holds_run():
            raise Missing(without_home(f"{self.path} is no longer there: the run was moved or deleted"))

    def _summary(self) -> tuple[dict[str, Any], list["_Unread"]]:
        self._check()
        values = self._file(RECIPE, self._reader.recipe_values)
        evaluation = self._file(EVALUATION, self._evaluation)
        remarks = [one for one in (values, evaluation) if isinstance(one, _Unread)]
        values, evaluation = _or(values, {}), _or(evaluation, {})
        training = values.get("training")
        most = int(number(training.get("max_steps")) or 0) if isinstance(training, dict) else 0
        step = int(number(last_row(self.path / METRICS).get("step")) or 0)
        told = {
            "name": str(values.get("name") or self.path.name),
            "path": str(self.path),
            **{key: str(values.get(key) or "") for key in ("algorithm", "model", "description")},
            "state": state_of(self.path, step >= most or isinstance(evaluation.get(STOPPED), str)),
            "step": step,
            "max_steps": most or None,
            "device": str(part(_or(self._file(PLAN, self._plan), {}), "device").get("torch_device") or ""),
            "changed": self._changed(),
            "headline": headline_of(evaluation),
        }
        return told, remarks

    def _changed(self) -> float | None:
        written = []
        for name in (RECIPE, PLAN, INPUTS, METRICS, SAMPLES, EVALUATION, EVALUATIONS):
            with suppress(OSError):
                written.append((self.path / name).stat().st_mtime)
        return max(written, default=None)

    def _file(self, name: str, read: Callable[[], Any]) -> Any:
        """Return what is read of a file, anew once the file has changed; an `_Unread` where it cannot be."""
        try:
            status = (self.path / name).stat()
            now: Any = (status.st_mtime_ns, status.st_size, status.st_ino)
            if not stat.S_ISREG(status.st_mode):
                return _Unread(shown(f"{self.path / name} is no file"))
        except OSError:
            now = None
        if (name, read) not in self._read or self._read[name, read][0] != now:
            try:
                value = read()
            except (UserError, OSError) as error:
                value = _Unread(" ".join(str(error).split()))
            self._read[name, read] = now, value
        return self._read[name, read][1]

    def _plan(self) -> dict[str, Any]:
        return shown(self._reader.plan())

    def _evaluation(self) -> dict[str, Any]:
        return shown(self._reader.evaluation())

    def _later(self) -> list[dict[str, Any]]:
        return shown(read_evaluations(self.path))

    def _text(self) -> str:
        return shown((self.path / RECIPE).read_text(encoding="utf-8", errors="replace"))

    def _inputs(self) -> dict[str, Any]:
        return shown(self._reader.inputs())

    def _tasks_and_weights(self) -> tuple[list[str], dict[tuple[str, str], float]]:
        """Return the names of the tasks, and the weights by task (an empty text without any) and reward."""
        values = _or(self._file(RECIPE, self._reader.recipe_values), {})
        tasks = {str(one.get("name", "")): one for one in _dicts(values.get("tasks"))}
        weights = {}
        for task, own in (tasks or {"": values}).items():
            for one in _dicts(own.get("rewards")):
                weight = number(one.get("weight"))
                weights[task, str(one.get("name") or one.get("function"))] = 1.0 if weight is None else weight
        return list(tasks), weights

    def _weight(self, task: str, reward: str) -> float:
        weights: dict[tuple[str, str], float] = self._file(RECIPE, self._tasks_and_weights)[1]
        return weights.get((task, reward), 1.0)


class _Unread(str):
    """Why a file could not be read."""


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if isinstance(value, _Unread) else value


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def headline_of(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first measure of the held-out evaluations; None where nothing was measured.

    Returns:
        ``measure``, its name; ``title``, in words; ``before``, ``latest`` (the last one while the run went on) and
        ``after``, each None or ``{"value", "text", "low", "high"}`` with the bounds of its interval, None where it has
        none; and ``text``: ``5.1% → 72.5%``.
    """
    if not evaluation:
        return None
    name, rows = headline(evaluation), during(evaluation)
    ends = {BEFORE: part(evaluation, BEFORE), "latest": rows[-1] if rows else {}, AFTER: part(evaluation, AFTER)}
    told = {when: _measured(name, row) for when, row in ends.items()}
    first, last = told[BEFORE], told[AFTER] or told["latest"]
    if first is None and last is None:
        return None
    text = " → ".join("?" if one is None else one["text"] for one in (first, last))
    return {"measure": name, "title": in_words(name), **told, "text": text}


def _measured(name: str, row: dict[str, Any]) -> dict[str, Any] | None:
    if (value := number(row.get(name))) is None:
        return None
    low, high = interval_of(row, name) or (None, None)
    return {"value": value, "text": format_measure(name, value), "low": low, "high": high}


def environment(plan: dict[str, Any], inputs: dict[str, Any]) -> list[list[str]]:
    """Return in words what a run was made on and of: the device of its plan, its base and its data."""
    device = part(plan, "device")
    told: dict[str, Any] = {
        "device": device.get("name"),
        "torch device": device.get("torch_device"),
        "memory": format_bytes(device.get("total_bytes")) if device.get("total_bytes") else None,
        "free at the start": format_bytes(device.get("free_bytes")) if device.get("free_bytes") else None,
        "driver": device.get("driver"),
        "compute capability": ".".join(map(str, capability))
        if isinstance(capability := device.get("compute_capability"), list)
        else None,
        "profile": plan.get("profile"),
    }
    base = part(inputs, "base")
    told |= {"base": base.get("model"), "base's weights": _digest(base.get("weights"))}
    for split, one in part(inputs, "data").items():
        if isinstance(one, dict):
            rows, digest = number(one.get("rows")), _digest(one.get("sha256"))
            about = [str(one.get("source") or "?"), f"{rows:,.0f} rows" if rows is not None else "", digest or ""]
            told[f"data, {split}"] = ", ".join(filter(None, about))
    for name, one in part(inputs, "learned").items():
        told[name] = one.get("source") if isinstance(one, dict) else None
    return [[name, str(value)] for name, value in told.items() if value not in (None, "")]


def _digest(value: Any) -> str | None:
    return f"sha256 {value[:12]}" if isinstance(value, str) and value else None


def shown(value: Any) -> Any:
    """Return JSON values with what looks like a secret masked in their texts, and the home folder written as ``~``."""
    if isinstance(value, str):
        return _name(value) if len(value) < _NAME else masked(without_home(value))
    if isinstance(value, dict):
        return {shown(str(key)): shown(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no other
    return [shown(item) for item in value] if isinstance(value, list | tuple) else value


@lru_cache(maxsize=2048)
def _name(text: str) -> str:
    return masked(without_home(text))
