"""Did you mean ...?"""

import difflib
from collections.abc import Iterable


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest allowed name, or an empty string when none is close."""
    close = difflib.get_close_matches(got, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
