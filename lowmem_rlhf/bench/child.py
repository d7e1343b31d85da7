"""Starting the process of a task, and waiting for what it says. No torch here."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TextIO

import psutil

from lowmem_rlhf.bench.checkout import checkout
from lowmem_rlhf.bench.work import Work
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.cuda import alone

TICK = 1.0  # seconds between two looks at the clock
Tick = Callable[[float], None]  # is told now and then what share is done, as far as the task tells
Start = Callable[[str, Work, float, Tick], dict[str, Any]]  # task, its work, seconds it may take


def run_child(name: str, work: Work, seconds: float, tick: Tick) -> dict[str, Any]:
    """Run a task in a process of its own and return its values.

    Args:
        seconds: after so many it is ended.
        tick: called about every second.

    Raises:
        UserError: the task says that the user has to mend something.
        RunError: it failed, ended without a word, or took too long.
    """
    device, environment = alone(work.device, _environment())
    told = json.dumps(replace(work, device=device).to_dict())
    command = [sys.executable, "-P", "-m", "lowmem_rlhf.bench.part", name, told]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=os.name == "posix",  # a terminal's Ctrl-C is for this process, which ends it
        )
        try:
            return _wait_for(process, log, time.monotonic() + seconds, seconds, tick)
        finally:
            end_tree(process)


def _environment() -> dict[str, str]:
    """Return the environment of a task: of a checkout, its own package is measured."""
    folder = checkout()
    paths = [*([str(folder)] if folder else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def _wait_for(
    process: "subprocess.Popen[str]", log: TextIO, ending: float, seconds: float, tick: Tick
) -> dict[str, Any]:
    assert process.stdout
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    share = 0.0
    while True:
        left = ending - time.monotonic()
        if left <= 0:
            raise RunError(f"it was ended, as it took longer than {seconds:.0f} s")
        with suppress(queue.Empty):
            line = lines.get(timeout=min(TICK, left))
            if not line:
                raise RunError(_last_words(process, log))
            message = json.loads(line)
            if "values" in message:
                values: dict[str, Any] = message["values"]
                return values
            if "error" in message:
                raise (UserError if message["user"] else RunError)(message["error"])
            share = message["done"] / message["total"]
        tick(share)


def _read(stream: TextIO, lines: "queue.Queue[str]") -> None:
    with suppress(ValueError, OSError):  # closed meanwhile
        for line in stream:
            lines.put(line)
    lines.put("")


def _last_words(process: "subprocess.Popen[str]", log: TextIO) -> str:
    code = process.wait()
    log.seek(0)
    said = [line.strip() for line in log.read()[-4000:].splitlines() if line.strip()]
    name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"its process ended with {name}{f': {said[-1]}' if said else ''}"


def end_tree(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it has started, where it has not ended by itself, and wait for it."""
    kill_tree(process)
    process.wait()
    if process.stdout:
        process.stdout.close()


def kill_tree(process: "subprocess.Popen[str]") -> None:
    """Let a process that still runs end, and all that it has started."""
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid)
        for one in [*tree.children(recursive=True), tree]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
