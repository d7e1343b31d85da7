"""A decoding pass as a graph of the device: captured once for each shape, and replayed for every further token.

Starting a kernel costs the host some microseconds, and a token of a small model starts a thousand of them; a replay
starts them all at once. What is captured must not wait for the device, and reads and writes the same memory each time
(`rollout.slots`). All graphs share one pool of memory, since only one of them runs at a time.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from lowmem_rlhf.hardware.memory import is_out_of_memory

Shape = tuple[int, ...]


def can_capture(device: torch.device) -> bool:
    """Whether the device's torch module has graphs."""
    return hasattr(torch.get_device_module(device), "CUDAGraph")


class Step(Protocol):
    """What is captured: a pass over memory that stays where it is."""

    def step(self) -> None:
        """Run the pass."""
        ...

    @property
    def shape(self) -> Shape:
        """What the pass has as Python's numbers, for which there is a graph of its own."""
        ...

    def save(self) -> Any:
        """Return what `restore` takes the pass back with, or None where that would take too much memory."""
        ...

    def restore(self, saved: Any) -> torch.Tensor:
        """Be as when `save` was called; return what the pass since then has computed."""
        ...

    def agree(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two results of `restore` are the same to rounding."""
        ...


class StepGraphs:
    """The graphs of a pass, by its shape.

    Args:
        device: where it runs.
        capture: whether it is captured at all.

    Attributes:
        why_not: why nothing is captured any more, as the end of a sentence; empty as long as it is.
    """

    def __init__(self, device: torch.device, capture: bool = True) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._graphs: dict[Shape, Any] = {}
        self._pool: Any = None
        self._tried = False
        self.why_not = "" if capture else "that was not asked for"
        if not can_capture(device):
            self.why_not = f"torch has none for {device.type}"

    def forget(self) -> None:
        """Let go of all graphs and their memory: what they read is no longer there."""
        self._graphs.clear()
        self._pool = None

    def run(self, pass_: Step) -> None:
        """Run the pass once: by its graph, which is captured when there is none for its shape.

        The first graph is held against the pass itself.
        """
        if self.why_not:
            pass_.step()
            return
        with self._on_device():
            self._run(pass_)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Be on the pass's device, whose streams and graphs are meant, where there may be several."""
        chosen = getattr(self._module, "device", None)
        return nullcontext() if chosen is None else chosen(self._device)

    def _run(self, pass_: Step) -> None:
        if (graph := self._graphs.get(pass_.shape)) is not None:
            graph.replay()
        else:
            self._first(pass_)

    def _first(self, pass_: Step) -> None:
        saved = None if self._tried else pass_.save()
        self._warm_up(pass_)  # which is the step that was asked for, unless it is taken back
        try:
            graph = self._captured(pass_)
        except RuntimeError as error:
            first = error.__context__  # a capture that fails within raises once more when it is ended
            if is_out_of_memory(error):
                raise
            if isinstance(first, RuntimeError | MemoryError) and is_out_of_memory(first):
                raise first from None
            self.give_up(str(error).partition("\n")[0])
            return
        if saved is not None:
            self._tried = True
            wanted = pass_.restore(saved)
            graph.replay()
            if not pass_.agree(pass_.restore(saved), wanted):
                self.give_up("a replayed pass does not compute what the pass itself does")
                pass_.step()
                return
            graph.replay()
        self._graphs[pass_.shape] = graph

    def give_up(self, why: str) -> None:
        """Capture nothing any more, for this reason."""
        self.forget()
        self.why_not = why

    def _warm_up(self, pass_: Step) -> None:
        """Run the pass beside the stream of all else, as a capture does: what is made on a first call exists then."""
        stream = self._module.Stream()
        stream.wait_stream(self._module.current_stream())
        with self._module.stream(stream):
            pass_.step()
        self._module.current_stream().wait_stream(stream)

    def _captured(self, pass_: Step) -> Any:
        self._pool = self._pool or self._module.graph_pool_handle()
        graph, here = self._module.CUDAGraph(), self._module.current_stream()
        # Other threads may ask the device for what they like meanwhile. A capture that cannot be ended leaves its own
        # stream as the present one (torch/cuda/graphs.py), so the outer block goes back.
        with (
            self._module.stream(here),
            self._module.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            pass_.step()
        return graph
