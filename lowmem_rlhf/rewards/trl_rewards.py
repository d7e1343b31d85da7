"""TRL's reward functions, named as ``trl.rewards:NAME``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.rewards.functions import Completion
from lowmem_rlhf.suggest import did_you_mean

PREFIX = "trl.rewards:"
_MAKES = "get_"  # begins the name of what returns a function for its options


def is_trl(name: str) -> bool:
    """Return whether a reward's name is one of TRL's."""
    return name.startswith(PREFIX)


def trl_names() -> list[str]:
    """Return the names that the installed TRL has."""
    from trl import rewards

    return sorted(name for name in dir(rewards) if name.endswith("_reward") or name.startswith(_MAKES))


def trl_factory(name: str) -> Callable[..., Any] | None:
    """Return what makes a reward of options, where TRL has it so (``get_...``); None for a function.

    Raises:
        UserError: TRL has no reward of that name.
    """
    found = _member(name)
    return found if name.removeprefix(PREFIX).startswith(_MAKES) else None


def trl_function(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Return a reward of TRL's that takes plain completions too: TRL's own take lists of messages only.

    Args:
        name: ``trl.rewards:NAME``.
        options: of what makes it; of a function none.

    Raises:
        UserError: TRL has no reward of that name.
        ValueError: TRL refuses a value.
    """
    function = _member(name)
    if trl_factory(name):
        function = function(**options)

    @functools.wraps(function)
    def call(*, completions: Sequence[Completion] = (), **columns: Any) -> Any:
        messages = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in completions]
        return function(completions=messages, **columns)

    return call


def _member(name: str) -> Callable[..., Any]:
    from trl import rewards

    own, names = name.removeprefix(PREFIX), trl_names()
    if own not in names:
        raise UserError(f"rewards: got {name!r}; the installed TRL has {', '.join(names)}{did_you_mean(own, names)}")
    return getattr(rewards, own)  # type: ignore[no-any-return]
