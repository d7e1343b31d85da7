"""Rows made in processes of their own, several at once: one that crashes or hangs gives a row that says so."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import lowmem_rlhf

HERE = Path(__file__).resolve().parent
PACKAGE = Path(lowmem_rlhf.__file__).resolve().parent
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "architecture_rows")  # imported once, then forked

Row = dict[str, Any]


@dataclass
class Worker:
    """A process that makes a row.

    Attributes:
        part: what it does at the moment.
    """

    name: str
    process: Any
    pipe: Connection
    part: str = "start"
    began: float = field(default_factory=time.monotonic)


def make_row(name: str, pipe: Connection) -> None:
    """Make a type's row and send it; before that, the name of every part as it begins."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    from architecture_rows import row_of
    from architectures import quiet

    quiet()
    pipe.send(row_of(name, quick=False, tell=pipe.send))


def rows_by_process(
    names: list[str],
    workers: int,
    seconds: float,
    make: Callable[[str, Connection], None] = make_row,
    libraries: Sequence[str] = LIBRARIES,
) -> Iterator[Row]:
    """Yield a row for each type as it is finished.

    Args:
        workers: processes at once.
        seconds: after which one is ended.
        make: what a process does.
        libraries: what is imported once and for all, where processes are forked.
    """
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    paths = [str(HERE), str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # of the server, which has no script's folder on its path
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload(list(libraries))
    waiting, running = list(names), {}  # type: list[str], dict[Connection, Worker]
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            pipe, end = context.Pipe(duplex=False)
            process = context.Process(target=make, args=(name, end), daemon=True)
            process.start()
            end.close()
            running[pipe] = Worker(name, process, pipe)
        for pipe in wait(list(running), timeout=1):
            row = heard(running[pipe])
            if row is not None:
                finish(running.pop(pipe))
                yield row
        for pipe, worker in list(running.items()):
            if time.monotonic() - worker.began > seconds:
                finish(running.pop(pipe))
                yield lost(worker, f"still at {worker.part} after {seconds:.0f} s")


def heard(worker: Worker) -> Row | None:
    """Read what a worker sends: the row, or None where it has only told of a part."""
    try:
        message = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return lost(worker, f"the process ended with code {worker.process.exitcode} at {worker.part}")
    if isinstance(message, dict):
        return message
    worker.part = message
    return None


def lost(worker: Worker, why: str) -> Row:
    """Return the row of a worker that gave none: not ours where it never came beyond making the model."""
    verdict = "not_built" if worker.part in ("start", "build") else "traceback"
    return {"type": worker.name, "verdict": verdict, "why": why}


def finish(worker: Worker) -> None:
    """End a worker's process."""
    worker.process.terminate()
    worker.process.join()
    worker.pipe.close()
