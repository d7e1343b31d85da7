"""The package's own device tests on the card: the part ``device_tests``. They need a checkout."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from lowmem_rlhf.bench.checkout import checkout
from lowmem_rlhf.bench.child import kill_tree
from lowmem_rlhf.bench.work import Work
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.hardware.capabilities import kind_of
from lowmem_rlhf.progress import ProgressCallback

OUTCOME = re.compile(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*?(?:\[ *(\d+)%\])?\s*$")
SPARE = 10.0  # seconds left for the end of the process


def run_tests(work: Work, progress: ProgressCallback) -> dict[str, Any]:
    """Run the tests of the card and count; what the time is too short for is left out.

    Returns:
        ``passed``, ``failed`` and ``skipped``, ``failures`` by name, ``finished``: whether all of them have run.

    Raises:
        RunError: no test has run.
    """
    folder = checkout()
    if folder is None:
        raise RunError("the tests are in a checkout of the repository, not in the installed package")
    options = ["-k", f"{kind_of(work.device)}:0", "-v", "--tb=no", "-p", "no:cacheprovider"]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "tests/integration", *options],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout
    timer = _Timer(process, time.monotonic() + work.seconds - SPARE)
    lines = []
    with timer:
        for line in process.stdout:
            lines.append(line)
            if (match := OUTCOME.match(line)) and match[3]:
                progress(int(match[3]), 100)
    process.wait()
    found = counted(lines)
    if not found["passed"] + found["failed"] + found["skipped"]:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        raise RunError("no test ended in the time that there was" if timer.ended else f"pytest ran no test: {last}")
    return {**found, "finished": not timer.ended}


class _Timer:
    """Ends a process at a time, unless its block is left before."""

    def __init__(self, process: "subprocess.Popen[str]", at: float) -> None:
        self.ended = False
        self._process = process
        self._timer = threading.Timer(max(0.0, at - time.monotonic()), self._end)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.ended = True
        kill_tree(self._process)


def counted(lines: Iterable[str]) -> dict[str, Any]:
    """Return how many tests ended in which way, from what ``pytest -v`` prints.

    A test that fails once more when it is taken down counts once.
    """
    outcomes: dict[str, str] = {}
    for line in lines:
        if match := OUTCOME.match(line):
            failed = "FAILED" if match[2] in ("FAILED", "ERROR") else match[2]
            outcomes[match[1]] = failed if outcomes.get(match[1]) != "FAILED" else "FAILED"
    values = list(outcomes.values())
    return {
        "passed": values.count("PASSED") + values.count("XPASS"),
        "failed": values.count("FAILED"),
        "skipped": values.count("SKIPPED") + values.count("XFAIL"),
        "failures": [name for name, outcome in outcomes.items() if outcome == "FAILED"],
    }
