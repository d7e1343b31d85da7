"""The rewards that can be named, with what each is, its options and the columns it reads. Loads without torch."""

import inspect
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic_core import PydanticUndefined

from lowmem_rlhf.recipe.sections import REWARD_OPTIONS
from lowmem_rlhf.rewards.loading import needed_columns
from lowmem_rlhf.rewards.options import options_of, type_in_words
from lowmem_rlhf.rewards.shipped import FUNCTIONS, SHIPPED


@dataclass(frozen=True)
class Option:
    """An option of a reward.

    Attributes:
        type: what its value should be, in words.
        required: whether it has no default.
        default: None where it is required, too.
    """

    type: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Described:
    """A reward.

    Attributes:
        kind: a function, or a model that learned to judge.
        description: one sentence.
        columns: of the data, which it cannot do without; an option may name another one.
        options: by name.
    """

    kind: Literal["function", "learned"]
    description: str
    columns: list[str]
    options: dict[str, Option]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def described_rewards() -> dict[str, Described]:
    """Return the shipped and the learned rewards by name."""
    return {name: _shipped(name) for name in SHIPPED} | {name: _learned(name) for name in REWARD_OPTIONS}


def _shipped(name: str) -> Described:
    function = SHIPPED[name]
    options = {
        key: Option(type_in_words(one.annotation), True)
        if one.default is inspect.Parameter.empty
        else Option(type_in_words(one.annotation), False, one.default)
        for key, one in options_of(function).items()
    }
    columns = [column for column in needed_columns(function) if column not in options] if name in FUNCTIONS else []
    return Described("function", _first_sentence(function.__doc__), columns, options)


def _learned(name: str) -> Described:
    section = REWARD_OPTIONS[name]
    options = {
        key: Option(type_in_words(one.annotation), one.is_required(), None if one.is_required() else one.default)
        for key, one in section.model_fields.items()
    }
    assert all(one.default is not PydanticUndefined for one in options.values())
    return Described("learned", _first_sentence(section.__doc__), [], options)


def _first_sentence(docstring: str | None) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join((docstring or "").strip().split("\n\n")[0].split())
