"""What is known of a run while it works: how far it is, the time left, curves, memory, samples. Displays draw it.

Telling it something sets values and draws nothing, so that it may be told of every part of a step. No torch here.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from lowmem_rlhf.display.format import format_measure, in_words, number
from lowmem_rlhf.run.held_out import LOSS, MEAN_REWARD

RECENT = 10  # steps that the time left and the trend look back on
_CURVE = 400  # values of a curve: more than a terminal has columns
EVALUATION = "evaluation"  # how the names of its phases begin


class RunState:
    """A run under way.

    Attributes:
        total, step: the steps of the run, and those that are finished.
        samples: the run writes completions (as opposed to learning from given texts).
        evaluates: the held-out examples are evaluated between the first and the last step, too.
        name, done, done_of: the phase that runs now (empty: none) and how far it is.
        metrics: the last finished step's.
        curve: of the mean reward, or of the loss where nothing is rewarded.
        best, worst: the completions of the highest and the lowest reward in the last rollout, with ``prompt``,
            ``completion`` and ``reward``.
        held_out: what the last evaluation found, as a sentence.
        peak: the most bytes that a step took.
    """

    def __init__(
        self,
        total: int,
        step: int = 0,
        plan: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            plan: as ``plan --json`` gives it; with ``evaluation_steps`` (see `session.train`) evaluations are counted
                to the time left.
        """
        self.total, self.step = total, step
        plan = plan or {}
        memory, predicted = plan.get("memory") or {}, plan.get("time") or {}
        self.samples = "rollout" in (memory.get("phases") or {})
        self.planned_peak = number(_planned(plan))
        self.card_bytes = number((plan.get("device") or {}).get("total_bytes"))
        self.name, self.done = "", 0
        self.done_of: int | None = None
        self.metrics: dict[str, Any] = {}
        self.curve: deque[float] = deque(maxlen=_CURVE)
        self.best: dict[str, Any] | None = None
        self.worst: dict[str, Any] | None = None
        self.held_out = ""
        self.peak: float | None = None
        self._clock, self._began = clock, clock()  # of the phase
        self._step_began = self._began
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._predicted_step = number(predicted.get("step_seconds"))
        self._evaluation_seconds = number(predicted.get("evaluation_seconds")) or 0.0
        self._every: int | None = plan.get("evaluation_steps")  # 0: only at the ends; None: never, or nobody tells
        self.evaluates = 0 < (self._every or 0) < total
        self._before_is_due = self._every is not None and step == 0
        self._worked = False  # a part of a step has run since the last one was told of

    def phase(self, name: str, done: int = 0, total: int | None = None) -> bool:
        """Take in how far a part of the work is; return whether it has begun with this."""
        begins = name != self.name
        if begins:
            self._end_phase()
            self.name, self._began = name, self._clock()
            self._worked = self._worked or not name.startswith(EVALUATION)
        self.done, self.done_of = done, total
        return begins

    def finish(self, metrics: dict[str, Any]) -> None:
        """Take in a finished step's row of metrics.jsonl."""
        now = self._clock()
        self._seconds.append(number(metrics.get("time/step")) or now - self._step_began)
        self._end_phase()
        self._step_began, self._worked, self._before_is_due = now, False, False
        step = number(metrics.get("step"))
        self.step = self.step + 1 if step is None else int(step)
        self.metrics = metrics
        value = number(metrics.get(MEAN_REWARD if MEAN_REWARD in metrics else LOSS))
        if value is not None:
            self.curve.append(value)
        if (peak := number(metrics.get("memory/peak_bytes"))) is not None:
            self.peak = max(self.peak or 0, peak)
        if (name := metrics.get("eval/headline")) is not None:
            value_text = format_measure(str(name), metrics.get(f"eval/{name}"))
            self.held_out = f"{in_words(str(name))} {value_text} after step {self.step}"

    def show_samples(self, best: dict[str, Any], worst: dict[str, Any]) -> None:
        """Take in two completions of a rollout."""
        self.best, self.worst = best, worst

    @property
    def phase_seconds(self) -> float:
        """How long the current phase has run."""
        return self._clock() - self._began

    @property
    def measured(self) -> bool:
        """Whether the time left is read from steps of this run, and not predicted."""
        return bool(self._seconds)

    def time_left(self) -> float | None:
        """Return the seconds until the end of the run, its evaluations counted in; None where nobody tells."""
        each = sum(self._seconds) / len(self._seconds) if self._seconds else self._predicted_step
        if each is None:
            return None
        evaluating = self.name.startswith(EVALUATION)
        finished = self.step + (evaluating and self._worked)  # that step is told of after its evaluation
        steps = max(self.total - finished, 0)
        spent = 0.0 if evaluating or not self._worked else min(self._clock() - self._step_began, each)
        evaluations = self._evaluations_after(finished) - evaluating
        left = steps * each - (spent if steps else 0.0) + max(evaluations, 0) * self._evaluation_seconds
        return left + (max(self._evaluation_seconds - self.phase_seconds, 0.0) if evaluating else 0.0)

    def trend(self) -> tuple[float, int] | None:
        """Return the change of the curve between the earlier and the later half of the recent steps, and how many."""
        values = tuple(self.curve)[-2 * RECENT :]
        half = len(values) // 2
        return (sum(values[-half:]) / half - sum(values[:half]) / half, half) if half >= 2 else None

    def rewards(self) -> list[tuple[str, float | None, int]]:
        """Return each reward's mean in the last step and how often its function failed."""
        found = []
        for key, mean in self.metrics.items():
            if key.startswith("reward/") and key.count("/") == 1 and key not in (MEAN_REWARD, "reward/std"):
                failures = [number(self.metrics.get(f"{key}/{how}")) or 0 for how in ("errors", "timeouts")]
                found.append((key.partition("/")[2], number(mean), int(sum(failures))))
        return found

    def speeds(self) -> list[tuple[str, float, float | None]]:
        """Return each part of the last step: its seconds, and the tokens a second where its tokens are counted."""
        counts = {"rollout": "tokens/generated", "update": "tokens/trained"}
        found = []
        for key, value in self.metrics.items():
            name, seconds = key.partition("/")[2], number(value)
            if key.startswith("time/") and name != "step" and seconds:
                tokens = number(self.metrics.get(counts.get(name, "")))
                found.append((name, seconds, None if tokens is None else tokens / seconds))
        return found

    def _evaluations_after(self, finished: int) -> int:
        """Return how many evaluations are to come once so many steps are finished, with the one that runs now."""
        if self._every is None:
            return 0
        running = self.name.startswith(EVALUATION)
        if finished >= self.total and not running and self._every and self.total % self._every == 0:
            return 0  # that of the last step was the one after
        first = finished if running and self._worked else finished + 1
        between = (self.total - 1) // self._every - (first - 1) // self._every if self._every else 0
        return int(self._before_is_due) + max(between, 0) + 1

    def _end_phase(self) -> None:
        """Measure an evaluation that is over; a step begins with the end of the one before it."""
        if self.name.startswith(EVALUATION):
            self._evaluation_seconds, self._before_is_due = self.phase_seconds, False
            self._step_began = self._clock()
        self.name, self.done, self.done_of = "", 0, None


def _planned(plan: dict[str, Any]) -> Any:
    """Return the bytes that a step will be seen to take: live tensors, on a CPU the process; or what is estimated."""
    if plan.get("verdict") in ("yes", "no") and (between := plan.get("peak_bytes_range")):
        return between[0]
    return (plan.get("memory") or {}).get("peak_bytes")
