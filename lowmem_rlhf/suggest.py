"""Did you mean ...? And names that are known in another spelling."""

import difflib
from collections.abc import Iterable


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest allowed name in any case, or an empty string for none."""
    names = {name.casefold(): name for name in allowed}
    close = difflib.get_close_matches(got.casefold(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


# the names that torch and TRL have for what a recipe calls otherwise
_SHORT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "adamw_torch": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
}


def spelled(got: str, allowed: Iterable[str]) -> str:
    """Return the allowed name that a text means in other capitals, with dashes for underscores or as a short name.

    A text that means none of them is returned as it is.
    """
    names = list(allowed)
    if got in names:
        return got
    known = {_folded(name): name for name in names}
    folded = _folded(got).removeprefix("torch.")
    return known.get(folded) or known.get(_SHORT.get(folded, "")) or got


def _folded(name: str) -> str:
    return name.strip().casefold().replace("-", "_")
