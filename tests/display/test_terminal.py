"""A real pseudo-terminal: what is written reaches it at once, and a whole run wraps nothing and leaves its lines."""

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from fake_run import Screen
from tiny_runs import save_tiny_model, tiny_values

from lowmem_rlhf import cli
from lowmem_rlhf.display.terminal import prepare_streams


@contextmanager
def _terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Let the standard streams be a terminal's, unbuffered as with PYTHONUNBUFFERED; give what it was sent."""
    ours, theirs = pty.openpty()
    sent: list[bytes] = []

    def read() -> None:
        while True:
            try:
                sent.append(os.read(ours, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    with monkeypatch.context() as patched:
        for name in ("stdout", "stderr"):
            raw = io.FileIO(os.dup(theirs), "w")
            patched.setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", newline="\n", write_through=True))
        os.close(theirs)
        prepare_streams()
        reader.start()
        try:
            yield lambda: b"".join(sent).decode()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            reader.join()
            os.close(ours)


def test_an_unbuffered_stream_stays_unbuffered_on_a_terminal(monkeypatch):
    with _terminal(monkeypatch) as sent:
        assert sys.stderr.isatty() and sys.stderr.write_through
        sys.stderr.write("a bar of a library, ended\n")
        sys.stdout.write("ours")  # not before it
    assert sent() == "a bar of a library, ended\r\nours"


def test_a_run_in_a_terminal_wraps_nothing_and_leaves_a_line_for_every_step(monkeypatch, tmp_path: Path):
    values = tiny_values(save_tiny_model(tmp_path / "model"))
    values["evaluation"] = {"steps": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    for name, value in (("COLUMNS", "60"), ("LINES", "24"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["lowmem-rlhf", "train", "tiny.yaml"])
    with _terminal(monkeypatch) as sent, pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    text = sent()
    begins = text.index("run directory: ")  # before it are the plan and bars of libraries
    screen = Screen(60)
    screen.feed(text[begins : text.index("a step took")])
    assert screen.folded == 0
    steps = [line for line in screen.lines if re.match(r"step \d", line)]
    assert [line.split()[1] for line in steps] == ["1/3", "2/3", "3/3"] and all("reward" in line for line in steps)
    names = [line[:11].strip() for line in screen.lines]
    at = len(names) - 1 - names[::-1].index("step")
    assert names[at : at + 9] == ["step", "", "reward", "memory", "rewards", "metrics", "speed", "held-out", "best"]
    assert screen.lines[at + 1].split() == ["finished"] and "after step 2" in screen.lines[at + 7]
    assert any(line.startswith("before training: held-out ") for line in screen.lines)
