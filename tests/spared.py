"""What tests are spared of a run where it is not what they test. Not a test module."""

import gc
import os
from collections.abc import Callable
from typing import Any


def spare_pictures(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Leave the pictures of runs and exports empty: each takes a second to draw."""
    from lowmem_rlhf.report import plots

    render = plots._render

    def empty(figure: Any, kind: str, dpi: int) -> bytes:
        return render(type(figure)(figsize=(1, 1)), kind, 20)

    put(plots, "_render", empty)


def spare_disk(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Leave it to the system when files reach the disk: a run waits for that some twenty times a step and its ends."""
    put(os, "fsync", lambda descriptor: None)


def spare_collector() -> None:
    """Let the garbage collector leave alone what was imported by now: it takes a third of a second at a run's end."""
    gc.collect()
    gc.freeze()
