"""What tests are spared of a run where it is not what they test. Not a test module."""

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

FROZEN: list[weakref.ref[Any]] = []  # the tensors among what the collector leaves alone


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
    FROZEN.extend(weakref.ref(tensor) for tensor in _tensors())
    gc.freeze()


def spare_scan(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let `LiveBytes` find all tensors without thawing what was imported, to go through which takes as long again."""
    from lowmem_rlhf.hardware.live_bytes import LiveBytes

    def scan(counter: Any) -> None:
        gc.collect()
        for tensor in (*_tensors(), *(reference() for reference in FROZEN)):
            if tensor is not None:
                counter.add(tensor)

    put(LiveBytes, "scan", scan)


def _tensors() -> Iterator[Any]:
    """Return the tensors among what the collector looks after."""
    import torch

    return (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
