"""Nothing is printed, and no other library is silenced for good, outside the command line and the displays."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lowmem_rlhf

sys.path.append(str(Path(__file__).parent / "integration"))
from tiny_runs import save_tiny_model, tiny_values

PACKAGE = Path(lowmem_rlhf.__file__).parent
SHOWS = ("display", "report")  # rooms whose work is to show values
# the displays of chat and doctor; processes of their own whose output is their answer
FILES = ("cli.py", "inference/chat/show.py", "doctor/show.py", "architecture/count_class.py", "doctor/probe.py")


@cache
def all_calls() -> list[tuple[str, str, str]]:
    """Return every call of the package: its file, the name that is called, and that with what it is taken from."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
                owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
                found.append((file.relative_to(PACKAGE).as_posix(), name, f"{owner}.{name}"))
    return found


def calls(names: set[str]) -> Iterator[str]:
    """Yield where a function or class of one of these names is called, as FILE."""
    for file, *called in all_calls():
        if not names.isdisjoint(called):
            yield file


def is_display(file: str) -> bool:
    return file in FILES or file.split("/")[0] in SHOWS


def test_only_the_command_line_and_the_displays_print():
    printing = set(calls({"print", "sys.stdout.write", "sys.stderr.write"}))
    assert {"cli.py", "display/lines.py"} <= printing
    assert not [file for file in printing if not is_display(file)]


def test_only_displays_make_consoles():
    making = set(calls({"Console"}))
    # a plan's table as text is its repr in Python
    assert [file for file in sorted(making) if not is_display(file)] == ["api/plan.py"]
    assert "display/lines.py" in making


def test_only_the_command_line_silences_other_libraries_for_good():
    assert set(calls({"hush"})) == {"cli.py", "bench/part.py"}  # the latter is a process of its own
    assert set(calls({"basicConfig", "filterwarnings"})) == {"quiet.py"}


SILENT = """
import lowmem_rlhf as lm

lm.train({recipe!r}, output="run", progress=None)
"""
LATER = """
import lowmem_rlhf as lm

with lm.open_run("run", progress=None) as run:
    assert run.generate("1+2=", compare=True) and run.evaluate() and run.export("adapter")
"""


@pytest.mark.long
def test_a_python_call_that_asks_for_silence_is_silent(tmp_path, monkeypatch):
    """In processes of their own: libraries talk while they are imported, which is once."""
    monkeypatch.chdir(tmp_path)
    recipe = tiny_values(save_tiny_model(tmp_path / "model"))
    recipe["training"] = {**recipe["training"], "max_steps": 1}
    for program in (SILENT.format(recipe=recipe), LATER):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
