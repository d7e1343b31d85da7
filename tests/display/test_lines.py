"""Lines and bars on the standard error stream."""

from io import StringIO

from rich.console import Console

from lowmem_rlhf.display.lines import Bars, ByteBars, Lines
from lowmem_rlhf.export.timed import timed
from lowmem_rlhf.progress import current, message, reported_as, shown_by


def work() -> None:
    with timed("merging as float16") as moved:
        for done in (2**20, 2**21, 2**22):
            moved(done, 2**22)
            if done == 2**21:
                message("a note between")


def shown(interactive: bool) -> str:
    """Return what a console gets to see of the bars while `work` runs."""
    console = Console(file=StringIO(), force_terminal=interactive, force_interactive=interactive, width=120)
    with ByteBars(console) as display, shown_by(display):
        work()
    return console.file.getvalue()


def test_messages_are_lines_and_a_pipe_sees_no_bars(capsys):
    assert shown(interactive=False) == ""
    assert capsys.readouterr() == ("", "a note between\nmerging as float16: 4 MiB in 0s\n")
    with shown_by(Lines()):
        work()
    assert capsys.readouterr() == ("", "a note between\nmerging as float16: 4 MiB in 0s\n")


def test_a_terminal_sees_a_bar_of_bytes():
    text = shown(interactive=True)
    assert "merging as float16" in text and "4.0/4.0 MiB" in text and "a note between" in text
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the bar is gone, and the cursor is back


def test_a_terminal_sees_a_bar_of_pieces_that_stays():
    console = Console(file=StringIO(), force_terminal=True, force_interactive=True, width=120)
    with Bars(console) as display, shown_by(display):
        move = reported_as("policy, loss")
        for done in range(1, 4):
            move(done, 3)
        text = console.file.getvalue()
        assert "policy, loss" in text and "3/3" in text
        assert text.endswith("\n\x1b[?25h")  # complete: the bar stays, and the cursor is back
    assert console.file.getvalue() == text


def test_a_phase_that_is_cut_short_leaves_no_bar():
    console = Console(file=StringIO(), force_terminal=True, force_interactive=True, width=120)
    with ByteBars(console) as display, shown_by(display):
        current().phase("writing", 1, 10)
        assert not console.file.getvalue().endswith("\x1b[2K")
    assert console.file.getvalue().endswith("\x1b[2K")


def test_nothing_is_shown_where_no_display_was_entered(capsys):
    work()
    assert capsys.readouterr() == ("", "")
