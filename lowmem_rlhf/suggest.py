"""Did you mean ...?"""

import difflib
from collections.abc import Iterable


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest allowed name in any case, or an empty string for none."""
    names = {name.casefold(): name for name in allowed}
    close = difflib.get_close_matches(got.casefold(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {names[close[0]]!r}?" if close else ""
