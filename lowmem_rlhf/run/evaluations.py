"""The evaluations of a run: ``evaluations.jsonl`` in its directory, one object a line. No torch here.

One object: ``made`` (time, UTC), ``version``, ``steps`` the policy was trained for, ``data``, ``samples``,
``temperature``, ``max_completion_length``, ``seed``, ``counts`` (of problems, examples or pairs), ``results`` (quantity
by target, each with ``value``, ``low`` and ``high``), ``difference`` (second target less the first) and ``method``.
"""

from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import append_lines, read_lines

EVALUATIONS = "evaluations.jsonl"


def append_evaluation(folder: Path, outcome: dict[str, Any]) -> Path:
    """Append an evaluation to those of a run; return the file.

    Raises:
        UserError: the run's folder cannot be written.
    """
    path = folder / EVALUATIONS
    try:
        append_lines(path, [outcome])
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); --json prints the results") from error
    return path


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run, oldest first.

    Raises:
        UserError: the file cannot be read.
    """
    return [row for _, row in read_lines(folder / EVALUATIONS)]
