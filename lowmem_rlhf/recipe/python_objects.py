"""Objects that a Python program gives in place of what a recipe would name: rows of data and reward functions.

A recipe names them ``python:NAME``, so that recipe.yaml says what they were. Whoever resumes or evaluates such a run
gives them again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lowmem_rlhf.errors import UserError

PREFIX = "python:"
_given: ContextVar[Mapping[str, Any] | None] = ContextVar("python_objects", default=None)


def is_python(reference: str) -> bool:
    """Return whether a value of a recipe stands for an object that a program gives."""
    return reference.startswith(PREFIX)


@contextmanager
def given(objects: Mapping[str, Any]) -> Iterator[None]:
    """Let recipes name these objects, by ``python:NAME``, inside the block."""
    token = _given.set(objects)
    try:
        yield
    finally:
        _given.reset(token)


def python_object(reference: str, key: str) -> Any:
    """Return the object that a recipe names.

    Args:
        reference: ``python:NAME``.
        key: the recipe's key that names it, for messages.

    Raises:
        UserError: this program has not given it.
    """
    objects = _given.get() or {}
    if reference not in objects:
        argument = "rewards" if key == "rewards" else "eval_data" if key == "data.eval" else "data"
        raise UserError(
            f"{key}: {reference} was given by a Python program and is not here; go on from Python and give it again "
            f"({argument}=... of lowmem_rlhf.train with resume=True, or of lowmem_rlhf.open_run)"
        )
    return objects[reference]
