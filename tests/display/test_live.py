"""The live view: a panel of fixed height that no text breaks, plain lines without a terminal, no metric is needed."""

import io
import itertools
import re

import pytest
from fake_run import GIB, NASTY, PLAN, Clock, Screen, events, metrics, terminal
from rich.cells import cell_len
from rich.console import Console

from lowmem_rlhf.display import live
from lowmem_rlhf.display.live import LiveView, tokens_per_second
from lowmem_rlhf.display.panel import joined, shortened, sparkline
from lowmem_rlhf.display.run_display import ConsoleDisplay, display_for
from lowmem_rlhf.display.state import RunState
from lowmem_rlhf.plain_text import on_one_line
from lowmem_rlhf.progress import show_samples

METRICS = {
    "step": 12, "reward/mean": 0.31, "kl": 0.002, "completion/mean_length": 5.1, "time/step": 2.0,
    "tokens/generated": 40, "tokens/trained": 28, "memory/peak_bytes": 0.4 * 2**30,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_frames_of_their_own(monkeypatch):
    """Frames are drawn when the tests ask for them, and not by time."""
    monkeypatch.setattr(live, "FRAMES_A_SECOND", 1e-3)


class Pipe(io.StringIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def rows_of(view: LiveView, width: int = 79) -> dict[str, str]:
    """Return the panel's lines by their names."""
    lines = [line.plain for line in view.panel.lines(width)]
    return {line[:11].strip(): line[11:].strip() for line in lines}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_wraps_and_nothing_jumps_in_any_frame_of_a_run(width):
    console, clock = terminal(width), Clock()
    screen, names = Screen(width), set()
    with LiveView(12, 0, console, PLAN, clock) as view:
        assert view._live is not None
        for _ in events(view, clock, 12, 5):
            view._live.refresh()
            screen.feed(console.file.getvalue())
            console.file.seek(0)
            console.file.truncate()
            panel = screen.lines[-10:]
            names.add(tuple(line[:11].strip() for line in (panel[0], *panel[2:])))
            assert all(cell_len(line) < width for line in panel)
    assert screen.folded == 0
    assert names == {("step", "reward", "memory", "rewards", "metrics", "speed", "held-out", "best", "worst")}
    steps = [line for line in screen.lines if re.match(r"step \d", line)]  # left by each
    assert [line.split()[1] for line in steps] == [f"{step}/12" for step in range(1, 13)]
    assert " ".join(" ".join(screen.lines).split()).count("the best so far") == 2  # messages are folded, and stay


@pytest.mark.parametrize("height", [3, 6, 12, 50])
def test_no_frame_is_higher_than_the_terminal(height):
    console = terminal(80, height)
    view = LiveView(12, 0, console, PLAN, Clock())
    with console.capture() as capture:
        console.print(view.panel)
    lines = capture.get().splitlines()
    assert len(lines) == min(10, height - 2) and "0/12" in lines[0]


def test_a_frame_shows_all_that_is_asked_for():
    clock = Clock()
    view = LiveView(60, 0, terminal(), PLAN, clock)
    for event in itertools.islice(events(view, clock), 400):
        if event == "step" and view.state.step == 20:
            break
    view.phase("update", 3, 12)
    clock.now += 5
    view.samples(*({"prompt": "7 + 20?", "completion": text, "reward": r} for text, r in (("27", 1.0), ("20", 0.0))))
    rows = rows_of(view, 119)
    assert rows["step"].endswith("20/60 ETA 32m35s")  # 40 steps of 40 s, 5 s of one spent, 4 evaluations of 90 s
    assert rows["update"].endswith(" 3/12 5s") and rows["update"].startswith("███████████████·")
    assert re.search(r"[▁▂▃▄▅▆▇█]{20} +0\.370 \(\+0\.15 in 10 steps\)$", rows["reward"])
    assert rows["memory"].endswith("peak 7.83 of 11.00 GiB, planned 9.03")
    bar = rows["memory"].split()[0]
    assert bar.index("│") == int(9.03 / 11 * len(bar)) and bar.count("█") == int(7.83 / 11 * len(bar))
    assert rows["rewards"] == "correct_answer 0.4   format_of_the_answer -0.25 (3 failed)   長さ 0.1"
    assert rows["metrics"].startswith("kl 0.0021   length 200   cut 3%   entropy 1.31   no signal 25%")
    assert rows["speed"] == "rollout 20.0 s 640 tok/s  score 5.0 s  update 15.0 s 2,560 tok/s"
    assert rows["held-out"] == "accuracy 52.3% after step 20"
    assert rows["best"] == "1      7 + 20? → 27" and rows["worst"] == "0      7 + 20? → 20"


def test_where_nothing_is_sampled_the_panel_shows_the_loss():
    plan = {**PLAN, "memory": {"phases": {"update": {}}}, "evaluation_steps": None}
    view = LiveView(60, 0, terminal(), plan, Clock())
    for step in range(1, 5):
        view.step({"step": step, "loss": 2.0 - step / 4, "accuracy": 0.5, "time/update": 2.0, "tokens/trained": 500})
    rows = rows_of(view)
    assert list(rows) == ["step", "", "loss", "memory", "metrics", "speed"]
    assert rows["loss"].startswith("█▆▃▁") and "1.000 (-0.5 in 2 steps)" in rows["loss"]
    assert rows["metrics"] == "accuracy 0.500" and rows["speed"] == "update 2.0 s 250 tok/s"


def test_the_mark_turns_red_where_memory_is_above_the_plan():
    view = LiveView(60, 0, terminal(), PLAN, Clock())
    for peak, colour in ((9.0, "bold yellow"), (9.5, "bold red")):
        view.step({"memory/peak_bytes": peak * GIB})
        line = next(line for line in view.panel.lines(79) if line.plain.startswith("memory"))
        at = line.plain.index("│")
        assert [span.style for span in line.spans if span.start <= at < span.end] == [colour]


def test_rewards_are_cut_before_one_is_left_out():
    view = LiveView(60, 0, terminal(), PLAN, Clock())
    view.step(metrics(1))
    text = rows_of(view, 59)["rewards"]
    assert text == "corre… 0.4   forma… -0.25 (3 failed)   長さ 0.1"


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("width", [3, 10, 40, 100])
def test_a_text_of_others_is_a_line_of_known_width(text, width):
    line = shortened(text, width)
    assert cell_len(line) <= width and line.isprintable()
    console = terminal(width + 1)
    view = LiveView(2, 0, console, PLAN, Clock())
    view.samples(*({"prompt": text, "completion": text, "reward": 0.0} for _ in range(2)))
    view.phase(text)
    screen = Screen(width + 1)
    console.print(view.panel)
    screen.feed(console.file.getvalue())


def test_both_ends_of_a_long_text_are_seen():
    assert shortened("ends with the answer: " + "word " * 4000 + "#### 42", 40).endswith("word #### 42")
    assert shortened(" a\n\tb ", 10) == "a b" and shortened("[bold]x[/bold]", 20) == "[bold]x[/bold]"
    assert on_one_line("a\u202eb\u200d\ufe0f \x1b[2J") == "ab \\u001b[2J"


def test_joined_leaves_out_what_has_no_room_as_a_whole():
    assert joined(["one", "two", "three"], 10, " ") == "one two"
    assert joined(["longer than that", "x"], 8) == "long … t"


def test_a_sparkline_goes_from_its_smallest_to_its_largest():
    assert sparkline([0, 1, 2, 3], 10, "▁▂▃▄▅▆▇█") == "▁▃▆█"
    assert sparkline([5, 5], 10, "▁█") == "▁▁"
    assert sparkline([0, 0, 4, 4, 8, 8], 3, "▁▄█") == "▁▄█"  # means of two


def test_a_terminal_without_unicode_gets_ascii():
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = terminal(80, file=raw)
    view = LiveView(60, 0, console, PLAN, Clock())
    for step in range(1, 20):
        view.step(metrics(step))
    assert all(line.plain.isascii() for line in list(view.panel.lines(79, utf=False))[:4])


def test_the_time_left_is_the_plan_s_then_measured_and_counts_evaluations():
    clock = Clock()
    state = RunState(20, 0, {**PLAN, "evaluation_steps": 5}, clock)
    assert state.time_left() == 20 * 40 + 5 * 100 and not state.measured  # before, after 5, 10, 15 and at the end
    state.phase("evaluation before", 0, 8)
    clock.now += 30
    assert state.time_left() == 20 * 40 + 4 * 100 + 70
    clock.now += 30
    state.phase("rollout")  # the evaluation is over, and took 60
    clock.now += 15
    assert state.time_left() == 19 * 40 + 25 + 4 * 60
    clock.now += 1000  # a step takes much longer than was predicted: the others still take as long
    assert state.time_left() == 19 * 40 + 4 * 60
    for step in range(1, 5):
        state.finish({"step": step, "time/step": 50.0})
    assert state.measured and state.time_left() == 16 * 50 + 4 * 60
    state.phase("update")
    state.phase("evaluation of step 5")
    assert state.time_left() == 15 * 50 + 3 * 60 + 60  # the step is finished, though not told of
    clock.now += 80
    state.finish({"step": 5, "time/step": 50.0})
    assert state.time_left() == 15 * 50 + 3 * 80
    for step in range(6, 20):
        state.phase("update")
        state.finish({"step": step, "time/step": 50.0})
    assert state.time_left() == 50 + 80
    state.phase("update")
    state.phase("evaluation of step 20")
    clock.now += 20
    assert state.time_left() == 60
    state.finish({"step": 20, "time/step": 50.0})
    assert state.time_left() == 0.0


def test_the_time_left_without_a_plan_and_of_a_run_that_goes_on():
    clock = Clock()
    state = RunState(10, 0, None, clock)
    assert state.time_left() is None
    state.finish({"step": 1, "time/step": 3.0})
    assert state.time_left() == 27
    gone_on = RunState(20, 12, {**PLAN, "evaluation_steps": 5}, clock)
    assert gone_on.time_left() == 8 * 40 + 2 * 100  # after step 15, and at the end
    assert RunState(20, 0, {**PLAN, "evaluation_steps": 0}, clock).time_left() == 20 * 40 + 2 * 100
    assert RunState(20, 0, {**PLAN, "evaluation_steps": None}, clock).time_left() == 20 * 40


def test_one_line_a_step_without_a_terminal():
    pipe = Pipe()
    with LiveView(60, start_step=11, console=Console(file=pipe, width=40)) as view:
        view.phase("rollout", 1, 8)
        view.step(METRICS)
        flushed = pipe.flushes
        view.step({"kl": None})
        view.message("saved [bold]checkpoint[/bold]")
    first, second, message = pipe.getvalue().splitlines()
    assert first == ("step 12/60  reward 0.310  kl 0.002  len 5.1  2 s/step  34 tok/s  peak 0.40 GiB  ETA 1m36s")
    assert re.fullmatch(r"step 13/60  ETA \w+", second)
    assert message == "saved [bold]checkpoint[/bold]"
    assert flushed > 0


def test_a_pipe_is_told_of_evaluations_and_of_what_takes_long():
    pipe, clock = Pipe(), Clock()
    with LiveView(60, console=Console(file=pipe), plan=PLAN, clock=clock) as view:
        for done in range(0, 129):
            view.phase("evaluation before", done, 128)
            clock.now += 1
        for done in range(3):
            view.phase("rollout", done, 64)
            clock.now += 50
    lines = pipe.getvalue().splitlines()
    assert lines == ["evaluation before 0/128", "evaluation before 61/128", "evaluation before 122/128", "rollout 2/64"]


def test_a_code_page_without_the_character():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="cp1252"))
    with LiveView(1, console=console) as view:
        view.message("reward → 学")
    assert raw.getvalue().rstrip() == b"reward ? ?"


def test_the_cursor_comes_back_and_messages_stay():
    console = terminal()
    with LiveView(60, console=console) as view:
        view.step({})
        view.message("saved [brackets] stay\x1b[2J")
    text = console.file.getvalue()
    assert "saved [brackets] stay\\u001b[2J" in text and text.endswith("\x1b[?25h")
    assert "ended after step 1" in text


def test_an_error_ends_the_display_and_passes():
    console = terminal()
    with pytest.raises(ZeroDivisionError), LiveView(3, console=console) as view:
        view.step(METRICS)
        raise ZeroDivisionError
    assert view._live is None


def test_telling_the_display_draws_nothing():
    view = LiveView(60, console=terminal(), plan=PLAN)
    with view:
        drawn = view.panel.renders
        for done in range(10_000):
            view.phase("rollout", done, 10_000)
        view.samples(*({"prompt": "x", "completion": "y", "reward": 0.0} for _ in range(2)))
        assert view.panel.renders == drawn
        view.step(METRICS)
        assert view.panel.renders == drawn + 1  # with the step's line


def test_the_console_shows_the_plan_s_time_and_the_samples_of_a_run():
    console = terminal()
    display = ConsoleDisplay(console, terminal())
    display.plan({**PLAN, "fits": True, "time": None})
    display.begin(300, 0)
    assert isinstance(display._view, LiveView) and display._view.state.time_left() is None
    display.samples({"prompt": "p", "completion": "c", "reward": 1.0}, {"prompt": "p", "completion": "d", "reward": 0})
    assert rows_of(display._view)["best"].endswith("p → c")
    display.end()
    assert display._view is None


class Own:
    """A program's own display, without samples."""

    def phase(self, *_: object) -> None: ...

    message = begin = step = end = evaluation = plan = phase


def test_a_display_of_a_program_gets_samples_where_it_takes_them():
    best, worst = ({"prompt": "p", "completion": text, "reward": reward} for text, reward in (("a", 1.0), ("b", 0.0)))
    taken: list[object] = []
    for samples in (None, [], lambda *rows: taken.extend(rows)):
        own = Own()
        if samples is not None:
            own.samples = samples  # a list is an attribute of its own
        show_samples(display_for(own), best, worst)
    assert taken == [best, worst]
    show_samples(display_for(None), best, worst)


def test_tokens_per_second():
    assert tokens_per_second(METRICS) == 34.0
    assert tokens_per_second({"time/step": 2.0, "tokens/generated": 4}) == 2.0
    assert tokens_per_second({"time/step": 0.0, "tokens/generated": 4}) is None
    assert tokens_per_second({"time/step": 2.0}) is tokens_per_second({"tokens/trained": 2}) is None
