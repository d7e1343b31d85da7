"""A run that tells a display the events of a real one, on a clock of its own; and a terminal that is read again."""

import io
import re
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console

GIB = 2**30
PLAN: dict[str, Any] = {
    "verdict": "yes",
    "peak_bytes_range": [9.03 * GIB, 11.29 * GIB],
    "device": {"name": "GeForce RTX 2080 Ti (11 GB)", "total_bytes": 11 * GIB},
    "memory": {"peak_bytes": 10.16 * GIB, "phases": {"rollout": {"weights": 2 * GIB}, "update": {"weights": 9 * GIB}}},
    "time": {"step_seconds": 40.0, "evaluation_seconds": 100.0},
    "evaluation_steps": 10,
}
TOKENS = 64 * 200
NASTY = [
    "学习机器学习，答案是四十二。" * 30,
    "👨‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ " * 40,
    "[bold red]markup[/bold red] [link=file:///etc/passwd]x[/link] [/]",
    "\x1b[2J\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b31m a\rb\x08\x08 c\td\n\n\ne \u202egnp.exe\u202c \u2028\ufeff",
    "e\u0301" * 300 + "z\u0335\u0321\u0322" * 50,
    "ends with the answer: " + "word " * 4000 + "#### 42",
    "",
    "\ud800 half of a character",
]


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def metrics(step: int) -> dict[str, Any]:
    """Return a step's row of metrics.jsonl."""
    return {
        "step": step,
        "reward/mean": 0.05 + 0.9 * step / 60 + 0.02 * (-1) ** step,
        "reward/std": 0.3,
        "reward/correct_answer": 0.4,
        "reward/format_of_the_answer": -0.25,
        "reward/format_of_the_answer/errors": 3,
        "reward/長さ": 0.1,
        "kl": 0.0021,
        "completion/mean_length": 200.0,
        "completion/truncated": 0.03,
        "groups/without_signal": 0.25,
        "entropy": 1.31,
        "grad_norm": 0.4,
        "learning_rate": 1e-5,
        "tokens/generated": TOKENS,
        "tokens/trained": 3 * TOKENS,
        "time/rollout": 20.0,
        "time/score": 5.0,
        "time/update": 15.0,
        "time/step": 40.0,
        "memory/peak_bytes": (7.5 + step / 60) * GIB,
    }


def events(display: Any, clock: Clock, total: int = 60, every: int = 10, start: int = 0) -> Iterator[str]:
    """Tell a display of a run, and yield after everything that it was told."""

    def part(name: str, seconds: float, count: int) -> Iterator[str]:
        for done in range(count + 1):
            display.phase(name, done, count)
            yield name
            clock.now += seconds / (count + 1)

    if start == 0:
        yield from part("evaluation before", 90.0, 4)
        display.message("before training: held-out accuracy 0.0508 [0.0344, 0.0744]")
    for step in range(start + 1, total + 1):
        yield from part("rollout", 19.0, 4)
        display.phase("rewards")
        yield "rewards"
        clock.now += 1.0
        sample = {"prompt": NASTY[(step + 3) % len(NASTY)], "completion": NASTY[step % len(NASTY)]}
        display.samples({**sample, "reward": 1.0}, {**sample, "reward": -1 / 3})
        yield "samples"
        yield from part("score", 5.0, 2)
        yield from part("update", 15.0, 3)
        found = {}
        if step % every == 0:
            yield from part(f"evaluation of step {step}", 90.0, 4)
            display.message(f"after step {step}: held-out accuracy 0.523 [0.49, 0.55], the best so far")
            found = {"eval/headline": "accuracy", "eval/accuracy": 0.523}
        display.step({**metrics(step), **found})
        yield "step"


def terminal(width: int = 80, height: int = 24, **options: Any) -> Console:
    """Return a console that takes itself for a terminal of this size; what it writes is ``.file.getvalue()``."""
    given = {"force_terminal": True, "file": io.StringIO(), "width": width, "height": height}
    return Console(**{**given, "_environ": {"TERM": "xterm-256color"}, **options})


_SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Screen:
    """What a terminal shows after what was written to it, scrolled lines too.

    It knows what rich writes: the cursor up and to a line's beginning, a line erased, colours.

    Attributes:
        folded: how many lines were wider than the terminal.
    """

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.row, self.folded = width, [""], 0, 0

    def feed(self, written: str) -> None:
        """Take in what was written.

        Raises:
            ValueError: something acts on the terminal that is none of these.
        """
        at = 0
        while at < len(written):
            if match := _SEQUENCE.match(written, at):
                at = match.end()
                self._act(match[1], match[2])
                continue
            self._show(written[at])
            at += 1

    def _act(self, count: str, kind: str) -> None:
        if kind == "A":
            self.row -= int(count or 1)
        elif kind == "K":
            self.lines[self.row] = ""
        elif kind != "m" and (count, kind) not in (("?25", "l"), ("?25", "h")):
            raise ValueError(f"a terminal was told {count}{kind}")

    def _show(self, character: str) -> None:
        if character == "\n":
            self.row += 1
            if self.row == len(self.lines):
                self.lines.append("")
        elif character == "\r":
            return  # rich erases the line next
        elif character < " " or "\x7f" <= character <= "\x9f":
            raise ValueError(f"a terminal was sent {character!r}")
        else:
            before = cell_len(self.lines[self.row])
            self.lines[self.row] += character
            self.folded += before <= self.width < cell_len(self.lines[self.row])
