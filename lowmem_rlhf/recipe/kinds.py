"""What a value of the schema may be, read from its annotation."""

import types
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@cache
def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """Return what a value of an annotation may be: classes, ``list[...]``, literals, None."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for one in get_args(annotation) for kind in kinds_of(one))
    return (type(None) if annotation is None else annotation,)


def item_of(annotation: Any) -> Any:
    """Return the annotation of a list's items; Any where the list is of anything, None where none is allowed."""
    kinds = kinds_of(annotation)
    lists = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
    return lists[0] if lists else Any if Any in kinds else None


def is_text(annotation: Any) -> bool:
    """Whether a scalar at this place can only be a text (or none)."""
    kinds = [kind for kind in kinds_of(annotation) if get_origin(kind) is not list]
    texts = [kind for kind in kinds if kind is str or _is_choice(kind)]
    return bool(texts) and all(kind in texts or kind is type(None) for kind in kinds)


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal and all(isinstance(one, str) for one in get_args(kind))


def choices_of(annotation: Any) -> Sequence[str]:
    """Return the texts that a value (or an item of a list) may be chosen from."""
    choices = [str(one) for kind in kinds_of(annotation) if _is_choice(kind) for one in get_args(kind)]
    items = item_of(annotation)
    return choices if items in (None, Any) else [*choices, *choices_of(items)]
