"""The passes of several processes over one base whose weights they share (see `sharded`).

Gathering a layer's weights takes all processes, but they have unequal numbers of passes: one samples longer, another
has no micro-batch. So each pass is announced, and a process that has come to a point where values are exchanged runs a
small row of its own, whose result nobody reads, until all have come there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.processes.world import Pass, World

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase

_ROW = Group([0], [[0, 0]], [0])


class Lockstep:
    """Keeps the passes of several processes over one sharded base together.

    Args:
        base: whose passes they are.
        world: the processes.
    """

    def __init__(self, base: "SharedBase", world: World) -> None:
        self._base, self._world = base, world
        self._fills = False  # a pass of this kind, beside another process's, announces nothing
        self._pending: torch.Tensor | None = None  # states of such a pass, whose backward pass may follow
        world.take_part = self._take_part

    def run(self, decode: Callable[[], Any]) -> Any:
        """Run the decoder's forward pass together with the others'; so does its backward pass, if it comes to one."""
        if self._fills:
            return decode()
        graded = torch.is_grad_enabled()
        self._world.announce(Pass.WITH_GRADIENT if graded else Pass.FORWARD)
        out = decode()
        if graded and out.last_hidden_state.requires_grad:
            out.last_hidden_state = _Announced.apply(out.last_hidden_state, self._world)
        return out

    def _take_part(self, what: Pass) -> None:
        """Do what another process does, on a row of one prompt token and one completion token."""
        if what is Pass.BACKWARD:
            states, self._pending = self._pending, None
            if states is None:
                return
            with self._base.role(POLICY):  # layers may be computed again; no parameter gets a gradient of it
                torch.autograd.grad(states, self._lowest(), torch.zeros_like(states), allow_unused=True)
            return
        with self._filling(), torch.set_grad_enabled(what is Pass.WITH_GRADIENT), self._base.role(POLICY):
            states = self._base.states(self._base.layout.lay_out([_ROW], self._base.device))
        self._pending = states if states.requires_grad else None

    @contextmanager
    def _filling(self) -> Iterator[None]:
        self._fills = True
        try:
            yield
        finally:
            self._fills = False

    def _lowest(self) -> list[torch.Tensor]:
        """Return the policy's parameters beside the first layer that has any: a backward pass comes by all above."""
        return list(next(iter(self._base.adapter_layers())).masters(POLICY))


class _Announced(torch.autograd.Function):
    """Does nothing, but says when the backward pass of a forward pass begins."""

    @staticmethod
    def forward(ctx, states, world):  # type: ignore[no-untyped-def]
        ctx.world = world
        return states.view_as(states)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.world.announce(Pass.BACKWARD)
        return grad, None
