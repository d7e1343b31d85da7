"""The options of rewards that are functions: which there are, and whether their values are of the right types."""

import inspect
import math
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.kinds import kinds_of
from lowmem_rlhf.suggest import did_you_mean

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "keys with values",
    list: "a list",
    type(None): "null",
}


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a function's parameters by name."""
    return dict(inspect.signature(function).parameters)


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the options of a shipped reward: its parameters that are given by keyword only."""
    return {name: one for name, one in parameters_of(function).items() if one.kind is one.KEYWORD_ONLY}


def unknown_option(reward: str, option: str, allowed: Iterable[str]) -> UserError:
    """Return the error that says that a reward has no such option."""
    allowed = list(allowed)
    return UserError(
        f"rewards: {reward} has no option {option!r}{did_you_mean(option, allowed)} "
        f"(its options: {', '.join(allowed) or 'none'})"
    )


def check_options(reward: str, allowed: dict[str, inspect.Parameter], options: dict[str, Any]) -> None:
    """Check the options of a reward against the parameters that they are.

    Args:
        reward: its name, for messages.
        allowed: the parameters that are options; where one is annotated, values must be of that type.

    Raises:
        UserError: an option is unknown, missing, or of another type.
    """
    for name, value in options.items():
        if name not in allowed:
            raise unknown_option(reward, name, allowed)
        annotation = allowed[name].annotation
        if annotation is not inspect.Parameter.empty and not _is_a(value, annotation):
            raise UserError(f"rewards: {reward}: option {name}: got {value!r}; give {type_in_words(annotation)}")
    for name, parameter in allowed.items():
        if name not in options and parameter.default is inspect.Parameter.empty:
            raise UserError(f"rewards: {reward} needs the option {name!r}; set it under its options")


def _is_a(value: Any, annotation: Any) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_is_a(value, one) for one in arguments)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_a(one, arguments[0]) for one in value)
    if annotation is Any:
        return True
    if isinstance(value, bool) and annotation in (int, float):
        return False
    if annotation is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, origin or annotation)


def type_in_words(annotation: Any) -> str:
    """Return what a value of an annotation should be, in plain words."""
    return " or ".join(_kind_in_words(kind) for kind in kinds_of(annotation))


def _kind_in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(repr(one) for one in arguments)
    if origin is list and arguments[0] in (str, float):
        return f"a list of {'texts' if arguments[0] is str else 'numbers'}"
    return _WORDS.get(origin or kind, str(kind))
