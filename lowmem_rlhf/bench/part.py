"""The process of one task: ``python -m lowmem_rlhf.bench.part PART.TASK WORK``.

WORK is a `bench.work.Work` as JSON. What goes out is one JSON object a line: ``{"done": 1, "total": 4}`` while it
works, then ``{"values": ...}``, or ``{"error": sentence, "user": whether it is for the user to mend}``.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from lowmem_rlhf.bench.parts import find_task
from lowmem_rlhf.bench.work import Work
from lowmem_rlhf.errors import LowmemError, UserError, one_line
from lowmem_rlhf.files import dumps
from lowmem_rlhf.progress import ProgressCallback


def run_task(name: str, work: Work, progress: ProgressCallback) -> dict[str, Any]:
    """Run a task in this process; return its values."""
    task = find_task(name)
    module, _, function = task.function.partition(":")
    values: dict[str, Any] = getattr(import_module(module), function)(work, progress, **task.options)
    return values


def answer(name: str, work: Work, send: Callable[[Mapping[str, Any]], None]) -> None:
    """Run a task and send its progress and what came of it."""
    try:
        values = run_task(name, work, lambda done, total: send({"done": done, "total": total}))
    except LowmemError as error:
        send({"error": one_line(error), "user": isinstance(error, UserError)})
    except Exception as error:
        first = one_line(error).partition(". ")[0][:300]
        send({"error": f"{type(error).__name__}: {first}", "user": False})
    else:
        send({"values": values})


def main() -> None:
    """Answer on what is standard output now; what libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from lowmem_rlhf.quiet import hush

    hush()

    def send(message: Mapping[str, Any]) -> None:
        out.write(dumps(message) + "\n")
        out.flush()

    answer(sys.argv[1], Work.from_dict(json.loads(sys.argv[2])), send)


if __name__ == "__main__":
    main()
