"""What a report has in itself of a run: all but the middle of many samples, and curves of at most a thousand points."""

import json
from pathlib import Path
from typing import Any

from lowmem_rlhf.page.source import RunSource

_ROWS, _BYTES = 2000, 4_000_000  # of samples at most
_POINTS = 1000
_AT_ONCE = 200


def report_data(path: Path) -> dict[str, Any]:
    """Return what the page of a report shows of the run in a directory.

    Returns:
        ``run``, ``columns`` (see `source.RunSource`) and ``samples``: ``rows``, oldest first, and ``left_out``, how
        many between the first half of them and the last half are not there.

    Raises:
        UserError: a log of the run cannot be read; Missing: there is no run.
    """
    source = RunSource(path)
    run = {**source.describe(), "path": path.name}  # where it lies here is nothing to those who get the file
    return {"run": run, "columns": source.columns(points=_POINTS), "samples": _samples(source)}


def _samples(source: RunSource) -> dict[str, Any]:
    count: int = source.samples(limit=1)["all"]
    first = _rows(source, "oldest", min(count, _ROWS - _ROWS // 2), _BYTES // 2)
    last = _rows(source, "newest", min(count - len(first), _ROWS // 2), _BYTES // 2)
    return {"rows": first + last[::-1], "left_out": count - len(first) - len(last)}


def _rows(source: RunSource, sort: str, most: int, size: int) -> list[dict[str, Any]]:
    """Return so many samples from one end, as far as their bytes as JSON allow."""
    found: list[dict[str, Any]] = []
    while len(found) < most:
        rows = source.samples(sort=sort, offset=len(found), limit=min(_AT_ONCE, most - len(found)))["rows"]
        for row in rows:
            size -= len(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace"))
            if size < 0:
                return found
            found.append(row)
        if not rows:  # the file became shorter meanwhile
            break
    return found
