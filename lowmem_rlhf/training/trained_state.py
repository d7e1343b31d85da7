"""What a run has learned at the end of a step, held outside the device, so that it can be saved whatever happens next.

The next step changes the weights long before it ends, and a card may stop answering. On a card the state is copied to
host memory once the step has ended; nothing is allocated on the card. On a CPU, whose memory is what the plan divides,
it lies in a file without a name in the run's folder.
"""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import nn

from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.memory import clock
from lowmem_rlhf.training.optimizer import Optimizer

_LOG = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainedState:
    """What a checkpoint holds, at the end of one step.

    Attributes:
        step: the last finished step.
        parameters: everything that trains, and a reference that follows it, by name, on the CPU.
        moments: the optimizer's tensors (see `Optimizer.tensors`), on the CPU.
        optimizer: the rest of its state (see `Optimizer.plain`).
        counters: see `Loop.state`.
    """

    step: int
    parameters: Tensors
    moments: Tensors
    optimizer: dict[str, Any]
    counters: dict[str, Any]


class Store(Protocol):
    """Where copies of tensors are kept."""

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy these, over what was there."""
        ...

    def get(self) -> Tensors:
        """Return the copies, on the CPU."""
        ...


class StateKeeper:
    """Keeps the state of the last finished step.

    Args:
        optimizer: with everything that trains.
        device: where that lies.
        folder: of the run, for the files that a CPU's state lies in.
        following: parameters by name that change now and then without an optimizer: a reference that follows.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device,
        folder: Path,
        following: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self._optimizer, self._folder, self._device = optimizer, folder, device
        self._following = dict(following or {})
        self._store: Store | None = None
        self._store_of_following: Store | None = None
        self._versions: list[int] = []  # of what lies there
        self._kept: tuple[int, dict[str, Any], dict[str, Any]] | None = None

    @property
    def step(self) -> int | None:
        """The step whose state is kept whole; None: none is, or it is being replaced."""
        return None if self._kept is None else self._kept[0]

    def keep(self, step: int, counters: dict[str, Any]) -> None:
        """Copy what there is now, the state at the end of a step."""
        self._kept = None  # until all of it is copied
        moments = self._optimizer.tensors()
        tensors = {**{f"{_PARAMETER}{name}": p.detach() for name, p in self._parameters.items()}, **moments}
        self._store = self._put(self._store, tensors)
        versions = [p._version for p in self._following.values()]
        if versions != self._versions:  # few steps change these
            still = {name: p.detach() for name, p in self._following.items()}
            self._store_of_following = self._put(self._store_of_following, still)
            self._versions = versions
        self._kept = (step, self._optimizer.plain(), counters)

    def _put(self, store: Store | None, tensors: Tensors) -> Store:
        """Copy tensors into a store, or where there is none yet, or no room, into a new one; return it."""
        if store is None:
            on_cpu = capabilities(self._device).on_cpu
            store = FileStore(self._folder) if on_cpu else HostStore(self._device)
        try:
            store.put(tensors)
        except OSError as error:  # a full disk, or one without room for files that have no name
            _LOG.warning(
                "the state at the end of each step cannot be kept in %s (%s); it is kept in memory",
                self._folder,
                error.strerror or error,
            )
            store = HostStore(self._device)
            store.put(tensors)
        return store

    def state(self) -> TrainedState:
        """Return the state that is kept; it is valid until the next `keep`.

        Raises:
            RuntimeError: none is.
        """
        if self._kept is None or self._store is None:
            raise RuntimeError("no state of a finished step is kept")
        tensors = self._store.get()
        parameters = {k.removeprefix(_PARAMETER): tensors.pop(k) for k in list(tensors) if k.startswith(_PARAMETER)}
        if self._store_of_following is not None:
            parameters |= self._store_of_following.get()
        step, optimizer, counters = self._kept
        return TrainedState(step, parameters, tensors, optimizer, counters)

    @torch.no_grad()
    def put_back(self) -> TrainedState:
        """Let everything that trains be as at the end of the step that is kept; return its state."""
        state = self.state()
        for name, parameter in self._parameters.items():
            parameter.copy_(state.parameters[name])
            parameter.grad = None
        for name, parameter in self._following.items():
            parameter.copy_(state.parameters[name])
        self._optimizer.put_back(state.moments, state.optimizer)
        return state

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._optimizer.parameters


_PARAMETER = "parameter:"  # before a name: a parameter, and not a moment of it


class HostStore:
    """Copies in host memory, pinned where the device can then copy beside its other work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = capabilities(device).pinned_copies
        self._copies: Tensors = {}

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Store.put`; waits for the copies, which are then there even if the device no longer answers."""
        for name in self._copies.keys() - tensors.keys():
            del self._copies[name]
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = self._copies[name] = self._empty(tensor)
            copy.copy_(tensor, non_blocking=self._pinned)
        clock(self._device)

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        if self._pinned:
            try:
                return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
            except RuntimeError:  # systems limit how much may be pinned
                self._pinned = False
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")

    def get(self) -> Tensors:
        """See `Store.get`."""
        return dict(self._copies)


class FileStore:
    """Copies in a file that has no name: it is gone when the process is, whatever ends it."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this object)
        self._shapes: list[tuple[str, torch.Size, torch.dtype]] = []

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Store.put`."""
        self._file.seek(0)
        for tensor in tensors.values():
            self._file.write(_bytes_of(tensor.cpu().contiguous()))
        self._file.flush()
        self._shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]

    def get(self) -> Tensors:
        """See `Store.get`."""
        self._file.seek(0)
        tensors: Tensors = {}
        for name, shape, dtype in self._shapes:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            if tensor.numel() and self._file.readinto(_bytes_of(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
                raise OSError(f"the file with the state of the last step ends within {name}")
            tensors[name] = tensor
        return tensors


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
