"""The panel of a run in a terminal: a fixed number of lines, each at most as wide as the terminal. No torch here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lowmem_rlhf.display.format import GIB, format_bytes, format_number, format_seconds, number
from lowmem_rlhf.display.state import RunState
from lowmem_rlhf.plain_text import on_one_line

_LABEL = 11  # columns of the names on the left
_SAID, _WIDEST = 38, 60  # columns for what stands behind a bar, and of the widest bar
_SHORTEST = 6  # columns that a reward's name is cut to
_NARROWEST = 20  # columns that are always drawn
_VALUE = len("-0.333")
_GAP = "   "
_LOOKED_AT = 400  # characters of each end of a text that is to be shown on a line
MARKS = {"utf": "█▏▎▍▌▋▊▉·│▁▂▃▄▅▆▇█", "ascii": "#       .|_.-~=+*#"}
_NUMBERS = (
    ("kl", "kl {:.2g}"),
    ("completion/mean_length", "length {:.0f}"),
    ("completion/truncated", "cut {:.0%}"),
    ("entropy", "entropy {:.2f}"),
    ("groups/without_signal", "no signal {:.0%}"),
    ("value/explained_variance", "explained variance {:.2f}"),
    ("accuracy", "accuracy {:.3f}"),
    ("eval/loss", "held-out loss {:.4f}"),
    ("grad_norm", "grad norm {:.2g}"),
    ("learning_rate", "lr {:.2g}"),
)


class Panel:
    """What rich draws of a run's state: as many lines in every frame, none of them folded.

    A terminal that is too low for all of them gets the first ones.
    """

    def __init__(self, state: RunState) -> None:
        """Draw this state."""
        self.state = state
        self.ended = ""  # what stands in place of the phase after the run
        self.renders = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        self.renders += 1
        width, utf = console.width - 1, console.encoding.lower().startswith("utf")  # the last column would wrap some
        yield from list(self.lines(max(width, _NARROWEST), utf))[: max(console.height - 2, 1)]

    def lines(self, width: int, utf: bool = True) -> Iterator[Text]:
        """Yield the lines for a terminal of so many columns."""
        state, room = self.state, width - _LABEL
        bar = Bar(max(min(room - _SAID, _WIDEST), 4), MARKS["utf" if utf else "ascii"])
        name, _, rest = on_one_line("" if self.ended else state.name).partition(" ")
        rows = [("step", self._steps(bar)), (name, self._phase(bar, rest))]
        rows += [("reward" if state.samples else "loss", self._curve(bar)), ("memory", self._memory(bar))]
        if state.samples:
            rows.append(("rewards", Text(_rewards(state, room))))
        rows += [("metrics", Text(joined(_numbers(state), room))), ("speed", Text(joined(_speeds(state), room, "  ")))]
        if state.evaluates:
            rows.append(("held-out", Text(on_one_line(state.held_out))))
        if state.samples:
            rows += [("best", _sample(state.best, room)), ("worst", _sample(state.worst, room))]
        for label, content in rows:
            line = Text.assemble((set_cell_size(label, _LABEL - 1), "dim"), " ", content, no_wrap=True)
            line.truncate(width, overflow="ellipsis")
            yield line

    def _steps(self, bar: "Bar") -> Text:
        state, left = self.state, self.state.time_left()
        eta = "" if left is None else f"ETA {format_seconds(left)}{'' if state.measured else ', predicted'}"
        said = f"{state.step:>{len(str(state.total))}}/{state.total}"
        done = bar.filled(state.step / state.total if state.total else 1.0)
        return Text.assemble(done, " ", (said, "bold"), " ", eta)

    def _phase(self, bar: "Bar", rest: str) -> Text:
        state = self.state
        if self.ended or not state.name:
            return Text(self.ended)
        said = [rest] if rest else []
        if state.done_of:
            said.append(f"{state.done:>{len(str(state.done_of))}}/{state.done_of}")
        said.append(format_seconds(state.phase_seconds))
        return Text.assemble(bar.filled(state.done / state.done_of if state.done_of else 0.0), " ", " ".join(said))

    def _curve(self, bar: "Bar") -> Text:
        values = tuple(self.state.curve)
        if not values:
            return Text("after the first step", "dim")
        last = f"{values[-1]:.3f}"
        if trend := self.state.trend():
            last += f" ({trend[0]:+.2g} in {trend[1]} steps)"
        line = sparkline(values, bar.width, bar.marks[10:])
        return Text.assemble((set_cell_size(line, bar.width), "cyan"), " ", last)

    def _memory(self, bar: "Bar") -> Text:
        state = self.state
        peak, planned, card = state.peak, state.planned_peak, state.card_bytes
        if not card:
            return Text("" if peak is None else f"peak {format_bytes(peak)}")
        measured = f"{peak / GIB:.2f}" if peak is not None else "-"
        drawn, said = bar.filled((peak or 0.0) / card), f"peak {measured} of {card / GIB:.2f} GiB"
        if planned:
            at, over = min(int(planned / card * bar.width), bar.width - 1), peak is not None and peak > planned
            mark = (bar.marks[9], "bold red" if over else "bold yellow")
            drawn, said = Text.assemble(drawn[:at], mark, drawn[at + 1 :]), f"{said}, planned {planned / GIB:.2f}"
        return Text.assemble(drawn, " ", said)


@dataclass(frozen=True)
class Bar:
    """A bar of a width that all bars of a frame share.

    Attributes:
        marks: a full cell, seven parts of one, an empty cell, the mark of a value, and the levels of a curve.
    """

    width: int
    marks: str

    def filled(self, share: float) -> Text:
        """Return the bar, filled to eighths of a cell."""
        full, part = divmod(round(min(max(share, 0.0), 1.0) * self.width * 8), 8)
        filled = self.marks[0] * full + (self.marks[part].strip() if part else "")
        return Text.assemble((filled, "green"), (self.marks[8] * (self.width - len(filled)), "dim"))


def joined(parts: Iterable[str], width: int, gap: str = _GAP) -> str:
    """Return as many whole parts as go on a line of this width; a first one that is too long for it is shortened."""
    line = ""
    for part in map(on_one_line, parts):
        longer = f"{line}{gap if line else ''}{part}"
        if cell_len(longer) > width:
            return line or shortened(part, width)
        line = longer
    return line


def shortened(text: str, width: int) -> str:
    """Return a text on one line of at most this many columns: its beginning and its end."""
    text = text if len(text) <= 2 * _LOOKED_AT else f"{text[:_LOOKED_AT]} {text[-_LOOKED_AT:]}"
    text = on_one_line(text)
    if cell_len(text) <= width:
        return text
    if width < 4:
        return set_cell_size(text, max(width, 0)).rstrip()
    tail, end = "", (width - 3) // 3
    for character in reversed(text):
        if cell_len(character + tail) > end:
            break
        tail = character + tail
    while tail and cell_len(tail[0]) == 0:  # a mark without its letter
        tail = tail[1:]
    return f"{set_cell_size(text, width - 3 - end).rstrip()} … {tail.lstrip()}"


def sparkline(values: Sequence[float], width: int, levels: str) -> str:
    """Return the values as a line of bars between their smallest and their largest, means of several where need be."""
    width = max(width, 1)
    if len(values) > width:
        cuts = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(values), max(values)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((value - low) * scale)] for value in values)


def _rewards(state: RunState, room: int) -> str:
    """Return the rewards' means behind their names, which are cut where the line has no room for all."""
    found = [(on_one_line(name), _mean(mean, failed)) for name, mean, failed in state.rewards()]
    texts: list[str] = []
    for most in range(max((cell_len(name) for name, _ in found), default=0), _SHORTEST - 1, -1):
        texts = [f"{name if cell_len(name) <= most else _cut(name, most)} {mean}" for name, mean in found]
        if cell_len(_GAP.join(texts)) <= room:
            break
    return joined(texts or map(" ".join, found), room)


def _mean(mean: float | None, failed: int) -> str:
    return format_number(mean) + (f" ({failed} failed)" if failed else "")


def _cut(name: str, width: int) -> str:
    return set_cell_size(name, width - 1).rstrip() + "…"


def _numbers(state: RunState) -> Iterator[str]:
    for key, text in _NUMBERS:
        if (value := number(state.metrics.get(key))) is not None:
            yield text.format(value)


def _speeds(state: RunState) -> Iterator[str]:
    for name, seconds, speed in state.speeds():
        tokens = "" if speed is None else f" {speed:,.0f} tok/s"
        yield f"{name} {seconds:.1f} s{tokens}"


def _sample(row: dict[str, Any] | None, room: int) -> Text:
    """Return a completion's reward and text, behind the end of its prompt where there is room."""
    if row is None:
        return Text("")
    value = f"{format_number(row['reward']):<{_VALUE}} "
    room -= cell_len(value)
    prompt = shortened(row["prompt"], room // 3) if room >= 60 else ""
    room -= cell_len(prompt) + 3 if prompt else 0
    return Text.assemble((value, "bold"), (f"{prompt} → " if prompt else "", "dim"), shortened(row["completion"], room))
