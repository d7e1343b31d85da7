"""The evaluations of a run: ``evaluations.jsonl`` in its directory, one object a line. No torch here.

One object: ``made`` (time, UTC), ``version``, ``steps`` the policy was trained for, ``data``, ``samples``,
``temperature``, ``max_completion_length``, ``seed``, ``counts`` (of problems, examples or pairs), ``results`` (quantity
by target, each with ``value``, ``low`` and ``high``), ``difference`` (second target less the first), ``headline`` (the
quantity that is shown first) and ``method``; where there are several tasks, ``tasks`` with ``counts``, ``results``,
``difference`` and ``headline`` of each.
"""

from pathlib import Path
from typing import Any

from lowmem_rlhf.files import append_lines, read_lines, writing
from lowmem_rlhf.run.lock import one_at_a_time

EVALUATIONS = "evaluations.jsonl"


def append_evaluation(folder: Path, outcome: dict[str, Any]) -> Path:
    """Append an evaluation to those of a run, after any other process that does; return the file.

    Raises:
        RunError: the run's folder cannot be written.
    """
    path = folder / EVALUATIONS
    with writing(path), path.open("ab") as file, one_at_a_time(file):
        append_lines(path, [outcome])
    return path


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run, oldest first.

    Raises:
        UserError: the file cannot be read.
    """
    return [row for _, row in read_lines(folder / EVALUATIONS)]
