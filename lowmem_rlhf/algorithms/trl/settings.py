"""The recipe's section `trl`: TRL's own keys, but for those that the recipe says elsewhere. Loads without torch."""

from collections.abc import Mapping
from typing import Any

from lowmem_rlhf.recipe.bounds import MOST_TOKENS
from lowmem_rlhf.recipe.errors import OptionErrors
from lowmem_rlhf.recipe.names import DECIDED

MAX_LENGTH = 1024  # tokens of a prompt with one answer where ``trl.max_length`` is absent; TRL's default too


def check_trl_section(values: Any) -> Any:
    """Return the ``trl:`` section as it is.

    Raises:
        OptionErrors: a key that the recipe says elsewhere, or a ``max_length`` that is no number of tokens.
    """
    if not isinstance(values, Mapping):
        return values
    lines = [f"{key}: is decided elsewhere; {DECIDED[key]}" for key in values if key in DECIDED]
    length = values.get("max_length", MAX_LENGTH)
    if not isinstance(length, int) or isinstance(length, bool) or not 2 <= length <= MOST_TOKENS:
        lines.append(
            f"max_length: got {length!r}; it should be a whole number from 2 to {MOST_TOKENS} (tokens of an example)"
        )
    if lines:
        raise OptionErrors(lines, below="")
    return values


def max_length(section: Mapping[str, Any]) -> int:
    """Return the most tokens that a prompt with one answer may have."""
    return int(section.get("max_length", MAX_LENGTH))
