"""A reward of Python code that passes tests: shipped, and made of its options as those of `texts` are.

Code that a model wrote is run. What it may take is limited (`code_runner`), so that it does a run no harm by accident,
or by the tricks that are learned. A security boundary this is not: docs/rewards.md says what is open.
"""

import marshal
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from lowmem_rlhf.data.values import is_missing
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.parallel import Ending, in_parallel
from lowmem_rlhf.progress import message
from lowmem_rlhf.rewards.code_cases import Case, cases_of, parsed
from lowmem_rlhf.rewards.texts import column_named

_RUNNER = Path(__file__).with_name("code_runner.py")
_GRACE = 15.0  # seconds beyond the limit in which the supervisor ends what is left
_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_PYTHON = {"python", "python3", "py"}
_REMEDY = (
    'its tests are a text of Python, a list of such texts, or cases of input and output ({"inputs": [...], "outputs": '
    '[...]} or a list of {"input": ..., "output": ...}); name their column in its option column'
)


def code_tests(
    *,
    column: str = "tests",
    score: Literal["all", "fraction"] = "all",
    timeout: float = 10.0,
    case_timeout: float = 4.0,
    memory: int = 1024,
    workers: int = 4,
    setup: str | None = None,
    entry_point: str | None = None,
) -> "CodeTests":
    """1.0 where the completion's Python code passes the tests in a column, otherwise 0.0; or the share that it passes.

    The code is the last block fenced by ``` as Python, else the last of no language, else all of the text behind
    ``</think>``. It runs in processes of their own, with limits; see docs/rewards.md for what these are, and are not.

    Args:
        column: the tests: one text of Python, or a list of them, each of which is a test; or cases, each of which is
            the standard input of a whole program and what it prints then, as a struct or its JSON text; a row without
            any has no value. MBPP's column is ``test_list``, HumanEval's ``test``, TACO's ``input_output``.
        score: ``fraction``: the share of the tests that pass, and not 1.0 for all of them.
        timeout: seconds for all tests of a completion.
        case_timeout: seconds for one case.
        memory: MiB of address space for a process.
        workers: completions whose code runs at the same time.
        setup: a column of Python that runs before the code, such as imports.
        entry_point: a column of the name that the tests' ``check`` is called with, as in HumanEval.

    Raises:
        ValueError: a number is out of its range, or a column has no name.
        UserError: programs cannot be limited on this system.
    """
    if not hasattr(os, "fork"):
        raise UserError(
            "rewards: code_tests limits programs by means of Linux or macOS; on this system their memory, processor "
            "time, files and processes would be unlimited, so it runs none: run it there, or in WSL"
        )
    for key, seconds in (("timeout", timeout), ("case_timeout", case_timeout)):
        if not 0 < seconds <= 3600:
            raise ValueError(f"{key}: got {seconds:g}; give a number of seconds above 0 and up to 3600")
    if not 64 <= memory <= 2**20:
        raise ValueError(f"memory: got {memory}; give a number of MiB from 64 to {2**20}")
    if not 1 <= workers <= 256:
        raise ValueError(f"workers: got {workers}; give a whole number from 1 to 256")
    for name in (column, setup, entry_point):
        if name is not None:
            column_named(name)
    return CodeTests(column, setup, entry_point, score == "all", timeout, case_timeout, memory, workers)


@dataclass(frozen=True)
class _Program:
    """Code, and the tests that it should pass."""

    setup: str
    code: str
    tests: tuple[str | Case, ...]


@dataclass(frozen=True)
class _Outcome:
    """What became of a program.

    Attributes:
        passed: of each test, as far as they were run.
        isolated: whether it had namespaces of its own.
        complaint: of the runner, where it failed itself.
    """

    passed: list[bool]
    isolated: bool
    complaint: str = ""


@dataclass
class CodeTests:
    """The reward; its first call sees whether programs can be run here at all.

    Attributes: the options of `code_tests`, and `remedy`, which `check_references` shows.
    """

    column: str
    setup: str | None
    entry_point: str | None
    all_count: bool
    timeout: float
    case_timeout: float
    memory: int
    workers: int
    remedy: str = _REMEDY
    tried: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that it needs."""
        return tuple(one for one in (self.column, self.setup, self.entry_point) if one is not None)

    @staticmethod
    def reads(value: Any) -> bool:
        """Whether a value is what tests are written as."""
        return bool(_tests(value))

    def __call__(self, texts: Sequence[str], **columns: Any) -> list[float | None]:
        """Return a value for each completion; equal programs are run once.

        Raises:
            RunError: no program can be run here.
        """
        none = [None] * len(texts)
        given = [none if one is None else columns[one] for one in (self.column, self.setup, self.entry_point)]
        programs = [self._program(*row) for row in zip(texts, *given, strict=True)]
        distinct = list(dict.fromkeys(one for one in programs if one is not None))
        if distinct:
            self._try()
        outcomes = dict(zip(distinct, in_parallel(self._run, distinct, self.workers), strict=True))
        return [None if one is None else self._value(one, outcomes[one]) for one in programs]

    def _program(self, text: str, tests: Any, setup: Any, entry_point: Any) -> _Program | None:
        """Return what a row asks to be run; None where it has no tests."""
        found = _tests(tests)
        if self.entry_point is not None and _is_texts(found):
            if not (isinstance(entry_point, str) and entry_point.strip().isidentifier()):
                return None
            found = [f"{test}\n\ncheck({entry_point.strip()})\n" for test in found]
        before = "\n".join(setup) if _is_texts(setup) else setup if isinstance(setup, str) else ""
        return _Program(before, code_of(text), tuple(found)) if found else None

    def _value(self, program: _Program, outcome: _Outcome) -> float:
        share = sum(outcome.passed) / len(program.tests)
        return float(share == 1) if self.all_count else share

    def _try(self) -> None:
        if self.tried:
            return
        (outcome,) = in_parallel(self._run, [_Program("", "x = 1", ("assert x == 1",))], 1)
        if outcome.passed != [True]:
            raise RunError(f"programs cannot be run here: {outcome.complaint or 'one that must pass its test fails'}")
        if not outcome.isolated:
            message(
                "code_tests: this system gives programs no namespaces of their own, so the code under test can use the "
                "network and signal your processes; run in a container or as another user if that matters"
            )
        self.tried = True

    def _run(self, program: _Program, ending: Ending) -> _Outcome:
        job = {"code": program.code, "setup": program.setup, "tests": program.tests, "all": self.all_count}
        job |= {"seconds": self.timeout, "case_seconds": self.case_timeout, "memory": self.memory * 2**20}
        folder = tempfile.mkdtemp(prefix="lowmem-rlhf-code-")
        life, told = os.pipe()
        try:
            process = subprocess.Popen(
                # -I without the half that would ignore the fixed hash seed; nothing else is in the environment
                [sys.executable, "-s", "-P", "-B", str(_RUNNER), str(life)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=_environment(folder),
                start_new_session=True,
                pass_fds=(life,),
            )
            with process, ending.by(lambda: os.write(told, b".")):
                try:
                    out, errors = process.communicate(marshal.dumps(job), timeout=self.timeout + _GRACE)
                except subprocess.TimeoutExpired:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)  # the tests' processes die with their supervisor
                    out, errors = b"", b"the supervisor did not end"
            if not out:
                _end_those_at_home_in(folder)
        except OSError as error:
            raise RunError(f"programs cannot be run here: {error}") from error
        finally:
            os.close(told)
            os.close(life)
            _remove(folder)
        return _outcome(out, errors)


def code_of(text: str) -> str:
    """Return the Python code of a completion: its last fenced block, or the whole text."""
    text = text.rpartition("</think>")[2]
    blocks = [(language.lower(), code) for language, code in _BLOCK.findall(text)]
    for wanted in (_PYTHON, {""}):
        if found := [code for language, code in blocks if language in wanted]:
            return textwrap.dedent(found[-1])
    return text


def _tests(value: Any) -> list[str] | list[Case]:
    """Return the tests that a column's value holds; empty where it holds none, or something else."""
    if is_missing(value):
        return []
    value = parsed(value)
    if cases := cases_of(value):
        return cases
    items = value if isinstance(value, list) else [value]
    if not _is_texts(items) or any(parsed(one) is not one for one in items):
        return []
    return [one for one in items if one.strip()]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _environment(folder: str) -> dict[str, str]:
    """Return the environment of a program under test: nothing of ours, so no token."""
    places = dict.fromkeys(("HOME", "TMPDIR"), folder)
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    threads["MALLOC_ARENA_MAX"] = "1"  # glibc sets address space aside for each thread
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **places, **threads}


def _outcome(out: bytes, errors: bytes) -> _Outcome:
    complaint = " ".join(errors.decode(errors="replace").split())[-300:]
    isolated, _, passed = out.partition(b" ")
    if isolated not in (b"0", b"1"):  # the supervisor was killed: where there are no namespaces, the code can do that
        return _Outcome([], True, complaint)
    return _Outcome([one == ord("1") for one in passed], isolated == b"1", complaint)


def _end_those_at_home_in(folder: str) -> None:
    """End what a program has left that has killed its supervisor."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("HOME") == folder:
                process.kill()


def _remove(folder: str) -> None:
    """Remove a folder, whatever stands in it."""
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):  # folders that cannot be entered, or thousands within each other
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            with suppress(OSError):
                subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
