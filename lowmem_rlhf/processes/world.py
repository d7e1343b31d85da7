"""The processes of a run and what they tell each other.

Every process holds the whole base and all adapters, and goes through the same steps. Completions, their scores and
their log-probs are gathered, so each process knows the whole batch and makes the same advantages, normalisers and
metrics of it. What is shared out is the work: each samples and scores its share of the prompts, runs its share of the
micro-batches, and the gradients of the adapters are summed once an optimizer step. The result is that of one process.

Inside `together` the passes of `engine.passes` are shared out; inside `apart` a process works for itself alone. Outside
of both it does so, too.

Where memory runs out in one process, all of them do that piece of work once more (`World.attempt`), since what it had
told the others by then is worth nothing. Python objects go over gloo and so through host memory; gradients over what
the device has for it (NCCL on CUDA).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from lowmem_rlhf.errors import LowmemError, RunError, one_line
from lowmem_rlhf.processes.shares import shared_out, whole_shared_out

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class PeerLostError(RunError):
    """Another process of the run has ended, or cannot be reached."""


@dataclass(frozen=True)
class _Failed:
    """What a process sends in place of a value when its part of the preparations has failed."""

    kind: type[LowmemError]
    text: str


@dataclass(frozen=True)
class _AgainMessage:
    """What a process sends in place of a value when it begins a piece of work once more."""

    level: int


class Pass(Enum):
    """A pass over a base whose weights the processes share, which all of them have to take part in."""

    FORWARD = 1
    WITH_GRADIENT = 2  # forward; a backward pass may follow
    BACKWARD = 3


class _Again(Exception):
    """Another process begins the piece of work at ``level`` once more, so this one does as well."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.level = level


@dataclass
class World:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: of this process; the one with 0 writes the run.
        size: how many there are.
        proportions: what each gets of the work; they sum up to 1.
        alike: all compute on cards of one kind. If not, parameters are taken over from the first one after every
            optimizer step, since other kernels may round otherwise.
        take_part: of a base whose weights they share: takes part in a pass that another process announces.
    """

    rank: int = 0
    size: int = 1
    proportions: tuple[float, ...] = (1.0,)
    alike: bool = True
    take_part: Callable[[Pass], None] | None = field(default=None, repr=False)
    _group: Any = field(default=None, repr=False)  # of gloo, for objects
    _left: bool = field(default=False, repr=False)
    _level: int = field(default=0, repr=False)  # of the piece of work that runs (`attempt`)

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def own(self, costs: Sequence[float]) -> range:
        """Return the places of this process's items; see `shared_out`."""
        return shared_out(costs, self.proportions)[self.rank]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of their ranks. All processes have to call it.

        Raises:
            PeerLostError: a process has ended or does not answer.
            LowmemError: a process said so with `failed`.
        """
        values = self._exchange(value)
        for rank, one in enumerate(values):
            if isinstance(one, _Failed):
                error = one.kind(one.text if rank == self.rank else f"process {rank}: {one.text}")
                error.known_to_all, error.said_elsewhere = True, self.rank > 0
                raise error
        if levels := [one.level for one in values if isinstance(one, _AgainMessage)]:
            raise _Again(min(levels))
        return values

    def sum(self, *numbers: float) -> list[float]:
        """Return the sums of these numbers over all processes."""
        if not self.several:
            return list(numbers)
        return [sum(values) for values in zip(*self.gather(numbers), strict=True)]

    def rows(self, rows: dict[int, "torch.Tensor"], device: "torch.device") -> dict[int, "torch.Tensor"]:
        """Return the rows of all processes: tensors on ``device`` by their places in the whole batch, in this order."""
        if not self.several:
            return rows
        import torch

        lengths = {row: len(values) for row, values in rows.items()}
        own = torch.cat(list(rows.values())).cpu() if rows else None  # one copy to the host
        together: dict[int, torch.Tensor] = {}
        for each, values in self.gather((lengths, own)):
            if values is not None:
                together |= zip(each, values.to(device).split(list(each.values())), strict=True)
        return {row: together[row] for row in sorted(together)}

    def attempt(self, work: Callable[[], T], is_worth_another: Callable[[BaseException], bool]) -> Callable[[], T]:
        """Return ``work`` so that all processes have done it when it returns, and begin once more where one does.

        Args:
            work: shared out; every process does its part, and may gather in it.
            is_worth_another: whether the caller of what is returned calls it again after this error.
        """
        if not self.several:
            return work

        def agreed() -> T:
            self._level += 1
            level = self._level
            try:
                while True:
                    try:
                        result = work()
                        self.gather(None)
                        return result
                    except _Again as again:
                        if again.level < level:
                            raise
            except (RuntimeError, MemoryError) as error:
                if self.take_part is None and is_worth_another(error):  # in a shared pass the others wait for this one
                    self._say_again(level)
                raise
            finally:
                self._level = level - 1

        return agreed

    def _say_again(self, level: int) -> None:
        others = [one.level for one in self._exchange(_AgainMessage(level)) if isinstance(one, _AgainMessage)]
        if min(others) < level:
            raise _Again(min(others))

    def agreed(self, work: Callable[[], T]) -> T:
        """Do a part of the preparations for which the processes do not wait for each other before it ends.

        Raises:
            LowmemError: it failed in one of them; raised in all.
        """
        if not self.several:
            return work()
        try:
            result = work()
        except Exception as error:
            if not isinstance(error, PeerLostError) and not getattr(error, "known_to_all", False):
                self.gather(_failed(error))
            raise
        self.gather(None)
        return result

    def _exchange(self, value: Any) -> list[Any]:
        """Return what every process sends, once all of them have come here and none is in a pass any more."""
        if not self.several:
            return [value]
        while True:
            values = self._exchange_once(value)
            running = next((one for one in values if isinstance(one, Pass)), None)
            if running is None:
                return values
            assert self.take_part is not None
            self.take_part(running)

    def announce(self, what: Pass) -> None:
        """Begin a pass together with all others: each takes part with one of its own, or takes part in its.

        Raises:
            RunError: another process is at a pass of another kind.
        """
        others = {one for one in self._exchange_once(what) if isinstance(one, Pass)}
        if others != {what}:
            raise RunError(
                f"the processes are at different passes ({', '.join(sorted(one.name for one in others))}), so the "
                "shared weights cannot be gathered; with hardware.shard_base a loss or a reward of your own has to run "
                "the model equally in each process"
            )

    def _exchange_once(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self.reached():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Turn what the network ends with into one sentence."""
        import torch

        if self._left:
            raise PeerLostError(f"process {self.rank} of {self.size} has left the others; start all of them anew")
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RunError(
                "the device's memory ran out while the processes exchanged gradients; lower "
                "hardware.micro_batch_tokens, and go on with --resume"
            ) from error
        except RuntimeError as error:  # DistBackendError is one
            raise PeerLostError(self.lost(error)) from error

    def leave(self) -> None:
        """Let the others know that nothing comes from this process any more: what they wait for fails at once."""
        if not self.several or self._left:
            return
        import torch.distributed as dist

        self._left = True
        if dist.is_initialized():
            dist.destroy_process_group()

    def lost(self, error: BaseException) -> str:
        """Return the sentence that a run ends with after such an error of the network."""
        return (
            f"this process ({self.rank} of {self.size}) has lost the others: one of them has ended, or the network has "
            f"({_of_torch(error)}); see what the others say, and go on with --resume"
        )

    def is_lost(self, error: BaseException) -> bool:
        """Whether a collective operation of torch's own has failed, as those that gather shared weights do."""
        if not self.several or not isinstance(error, RuntimeError):
            return False
        import torch.distributed as dist

        return isinstance(error, dist.DistError) or "gloo" in str(error)


def _failed(error: Exception) -> _Failed:
    """Return what tells the others of an error: of a kind that a text alone makes."""
    if not isinstance(error, LowmemError):
        return _Failed(RunError, f"{type(error).__name__}: {one_line(error)}")
    kind = next(kind for kind in type(error).__mro__ if kind.__module__.endswith("lowmem_rlhf.errors"))
    return _Failed(kind, str(error))


def _of_torch(error: BaseException) -> str:
    """Return what an error of torch's network says, without the place in its source and its general advice."""
    text = re.sub(r"^(\[[^]]*\]:? *)+", "", one_line(error))
    return text.partition(" This is typically")[0][:300].rstrip(". ")


ALONE = World()
_begun = ALONE  # of the run that this process belongs to
_current = ALONE


def begun() -> World:
    """Return the processes that this one was started with."""
    return _begun


def begin(world: World) -> None:
    """Let this process belong to these."""
    global _begun
    _begun = world


def current() -> World:
    """Return the processes among which the work at hand is shared out."""
    return _current


@contextmanager
def _shared_by(world: World) -> Iterator[None]:
    global _current
    before, _current = _current, world
    try:
        yield
    finally:
        _current = before


def together() -> Any:
    """Share out the work inside the block among all processes; every one of them has to come by."""
    return _shared_by(_begun)


def apart() -> Any:
    """Let this process do the work inside the block alone."""
    return _shared_by(ALONE)


def each_its_share(costs: Sequence[float], work: Callable[[range], T]) -> list[T]:
    """Let every process do ``work`` for its share of the items, which stay whole; return all results, in order.

    Args:
        costs: of the items.
        work: is given the places of the items, at least one.
    """
    world = current()
    own = whole_shared_out(costs, world.proportions)[world.rank]
    with apart():
        result = work(own) if own else None
    return [one for one in world.gather(result) if one is not None]
