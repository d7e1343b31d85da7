"""Tensors that are only sizes, with an autograd engine: a training step is run to see which blocks it takes, and when.

An operation takes the memory that torch's takes on a CUDA device and keeps what torch's keeps for the backward pass. A
storage gives its block back when Python drops the last reference to it, as in torch, so code that is written here as it
stands in a model's source also holds its intermediate results for as long.

The engine follows ``torch/csrc/autograd/engine.cpp``: the node that was made last runs first, what a node saved goes
when it has run, and a second gradient is added into the first one's memory if nobody else holds that. Checkpoints are
those of ``torch.utils.checkpoint`` with ``use_reentrant=False``: the forward pass saves nothing, the first operation of
the region that needs what it saved runs the region again, and that stops before the last tensor to be saved is used.
"""

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from sys import getrefcount
from typing import Any

from stock_memory.allocator import Block, CachingAllocator

WEIGHT = None  # stands in `save` for a weight: it is kept, but takes no memory of its own
LEAF = 1 << 62  # the number of a leaf's node: gradients are stored as soon as they are there


class Storage:
    """Memory that is given back when nobody holds it any more."""

    __slots__ = ("block", "graph", "part")

    def __init__(self, graph: "Graph", block: Block) -> None:
        self.graph, self.part, self.block = graph, graph.part, block
        graph.bytes[self.part] = graph.bytes.get(self.part, 0) + block.size

    def __del__(self) -> None:
        self.graph.bytes[self.part] -= self.block.size
        self.graph.allocator.release(self.block)


class SimTensor:
    """A tensor of ``count`` elements of ``width`` bytes. ``node`` is None where no gradient is needed."""

    __slots__ = ("count", "node", "storage", "width")

    def __init__(self, storage: Storage, count: int, width: int, node: "Node | None" = None) -> None:
        self.storage, self.count, self.width, self.node = storage, count, width, node


class Node:
    """An operation in the graph.

    Attributes:
        number: later ones run first in the backward pass.
        part: what its memory is counted under.
        inputs: the nodes that its gradients go to; None where no gradient is needed.
        saved: what its backward pass reads: tensors, or places in a checkpointed region.
        backward: maps the gradient of its result and what was saved to the gradients of its inputs.
    """

    __slots__ = ("backward", "inputs", "number", "part", "saved", "waiting")

    def __init__(
        self, number: int, part: str, inputs: "tuple[Node | None, ...]", saved: list[Any], backward: Any
    ) -> None:
        self.number, self.part, self.inputs, self.saved, self.backward = number, part, inputs, saved, backward
        self.waiting = 0

    def __lt__(self, other: "Node") -> bool:
        return self.number > other.number


class Region:
    """A checkpointed call: how many tensors it saves, and those that its second run has saved anew."""

    def __init__(self, call: Callable[[SimTensor], SimTensor], given: SimTensor) -> None:
        self.call, self.given = call, given
        self.count = 0
        self.kept: dict[int, SimTensor | None] | None = None


class _EnoughError(Exception):
    """Everything that a region saves has been saved anew."""


class Graph:
    """Makes tensors and runs backward passes.

    Attributes:
        part: what new memory is counted under.
        bytes: allocated bytes by part.
        bytes_at_peak: the same when most was allocated.
        gradients: the gradients of leaves, by their key.
        in_backward: whether a backward pass is running.
        adds_in_place: whether a second gradient may be added into the first one's memory. Under a dispatch mode, as
            used for measuring, torch does not.
    """

    adds_in_place = True

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self.part = "other"
        self.bytes: dict[str, int] = {}
        self.bytes_at_peak: dict[str, int] = {}
        self.gradients: dict[Any, SimTensor] = {}
        self.in_backward = False
        self._peak = self._number = 0
        self._region: Region | None = None

    @contextmanager
    def counted_as(self, part: str) -> Iterator[None]:
        """Count new memory under a part while the context is open."""
        before, self.part = self.part, part
        yield
        self.part = before

    def reset_peak(self) -> None:
        """Begin a new peak at what is allocated now."""
        self.allocator.reset_peaks()
        self._peak = 0

    def empty(self, count: int, width: int) -> SimTensor:
        """Take memory for a tensor."""
        storage = Storage(self, self.allocator.allocate(count * width))
        if self.allocator.allocated > self._peak:
            self._peak, self.bytes_at_peak = self.allocator.allocated, self.bytes.copy()
        return SimTensor(storage, count, width)

    def like(self, tensor: SimTensor, width: int | None = None) -> SimTensor:
        """Take memory for a tensor of the same shape."""
        return self.empty(tensor.count, tensor.width if width is None else width)

    def leaf(self, tensor: SimTensor, key: Any) -> SimTensor:
        """Return the tensor as one whose gradient is stored in `gradients`; its node holds it (``AccumulateGrad``)."""

        def store(grad: SimTensor, _: SimTensor) -> tuple[()]:
            self.gradients[key] = grad
            return ()

        held = SimTensor(tensor.storage, tensor.count, tensor.width)
        return SimTensor(tensor.storage, tensor.count, tensor.width, Node(LEAF, self.part, (), [held], store))

    def op(
        self,
        inputs: tuple[SimTensor, ...],
        count: int,
        width: int,
        backward: Callable[..., tuple[SimTensor | None, ...]],
        save: tuple[SimTensor | None, ...] = (),
        save_result: bool = False,
        view: bool = False,
    ) -> SimTensor:
        """Run an operation that makes one tensor.

        Args:
            inputs: the tensors that a gradient may go to.
            count, width: of the result.
            backward: ``backward(gradient, *saved)`` returns a gradient, or None, for each input.
            save: kept for the backward pass, from before the result is made.
            save_result: the result is kept too.
            view: the result lies in the memory of the first input.
        """
        nodes = tuple([x.node for x in inputs])
        needed = any(nodes)
        saved = [self._pack(x) for x in save] if needed else []
        out = SimTensor(inputs[0].storage, count, width) if view else self.empty(count, width)
        if needed:
            if save_result:
                saved.append(self._pack(out))
            self._number += 1
            out.node = Node(self._number, self.part, nodes, saved, backward)
        return out

    def checkpoint(self, call: Callable[[SimTensor], SimTensor], given: SimTensor) -> SimTensor:
        """Run ``call(given)`` without keeping what its backward pass reads."""
        self._region = Region(call, given)
        try:
            return call(given)
        finally:
            self._region = None

    def backward(self, root: Node, grad: SimTensor) -> None:
        """Send a gradient through the graph, which comes apart on the way."""
        _count_users(root)
        self.in_backward = True
        buffers = {root: grad}
        ready = [root]
        del grad, root
        while ready:
            node = heapq.heappop(ready)
            out = self._run(node, buffers.pop(node))
            inputs, node.inputs = node.inputs, ()
            for place, into in enumerate(inputs):
                given, out[place] = out[place], None
                if into is None:
                    continue
                if given is not None:
                    self._accumulate(buffers, into, given)
                del given
                into.waiting -= 1
                if not into.waiting:
                    heapq.heappush(ready, into)
        self.in_backward = False

    def _run(self, node: Node, grad: SimTensor) -> list[SimTensor | None]:
        self.part = node.part
        saved = [self._unpack(x) for x in node.saved]
        self.part = node.part  # a region that was run again has left another
        out = list(node.backward(grad, *saved))
        if node.number != LEAF:
            node.saved, node.backward = [], None
        return out

    def _accumulate(self, buffers: dict[Node, SimTensor], node: Node, given: SimTensor) -> None:
        if node not in buffers:
            buffers[node] = given
        # the buffer holds it, and the call has it as an argument: nobody else may
        elif not self.adds_in_place or getrefcount(buffers[node]) > 2 or getrefcount(buffers[node].storage) > 2:
            buffers[node] = self.like(buffers[node])

    def _pack(self, tensor: SimTensor | None) -> Any:
        kept = None if tensor is None else SimTensor(tensor.storage, tensor.count, tensor.width)
        region = self._region
        if region is None:
            return kept
        if region.kept is None:
            region.count += 1
            return region, region.count - 1
        region.kept[len(region.kept)] = kept
        if len(region.kept) == region.count:
            raise _EnoughError
        return kept

    def _unpack(self, saved: Any) -> Any:
        if not isinstance(saved, tuple):
            return saved
        region, place = saved
        if region.kept is None:
            region.kept, self._region = {}, region
            try:
                region.call(region.given)
            except _EnoughError:
                pass
            finally:
                self._region = None
        kept, region.kept[place] = region.kept[place], None
        return kept


def _count_users(root: Node) -> None:
    seen, stack = {root}, [root]
    while stack:
        for into in stack.pop().inputs:
            if into is not None:
                into.waiting += 1
                if into not in seen:
                    seen.add(into)
                    stack.append(into)
