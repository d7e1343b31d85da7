"""Tiny runs to evaluate: the makers stand in tests/integration."""

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))


@dataclass
class Done:
    """What a command left: exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def lowmem_rlhf(monkeypatch, capsys) -> Callable[..., Done]:
    """Return a function that runs the command line in this process."""
    from lowmem_rlhf import cli

    def command(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lowmem-rlhf", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(bool(exit.code))
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def eval_model(tmp_path_factory) -> Path:
    """Return the folder of a random two-layer Llama with its tokenizer."""
    from tiny_runs import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("eval-model"))


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    """Runs without report.html, the most of a tiny run's time."""
    from lowmem_rlhf.report import html

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_report", lambda run: None)
        yield
