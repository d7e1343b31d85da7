"""The one way in which a user's functions are called: whatever they do, the run is as before, and the fault is theirs.

Loads without torch.
"""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from lowmem_rlhf.errors import LowmemError, RunError
from lowmem_rlhf.rewards.process_state import FolderGone, preserved, seeded
from lowmem_rlhf.rewards.time_limit import TimeLimitExceeded, limited, raise_in
from lowmem_rlhf.stopping import SIGNALS
from lowmem_rlhf.user_code import describe, line_in

T = TypeVar("T")


class FunctionFault(Exception):
    """A user's function did something wrong; the message is one sentence, with file and line.

    Attributes:
        timed_out: whether it took longer than its limit.
    """

    def __init__(self, sentence: str, timed_out: bool = False) -> None:
        super().__init__(sentence)
        self.timed_out = timed_out


def guarded(
    call: Callable[[], T],
    what: str,
    source: str = "",
    seconds: float | None = None,
    key: str = "",
) -> T:
    """Return what a call of a user's function gives; the process is as before (`process_state.preserved`).

    Args:
        call: the function with its arguments; who calls sees to it that they are copies.
        what: such as ``reward function NAME``, for messages.
        source: the user's file, as the recipe names it.
        seconds: the time limit (`time_limit.limited`); None: there is none.
        key: what its random numbers follow from, beside the run (`process_state.seeded`).

    Raises:
        FunctionFault: it raises anything (SystemExit and KeyboardInterrupt, too), or takes longer than its limit.
        KeyboardInterrupt: the user pressed Ctrl-C meanwhile, even if the function has caught it. What handlers of other
            signals raise is raised as well.
        UserError: it raises one.
        RuntimeError: the device's memory ran out; then `hardware.memory.is_out_of_memory`.
    """
    stops: list[BaseException] = []
    with _noted(stops):
        try:
            with preserved(), seeded(key):
                result = limited(call, seconds, what)
        except BaseException as error:
            if stops:
                raise stops[0] from None
            _raise_fault(error, what, source, seconds)
        if stops:
            raise stops[0]
    return result  # type: ignore[no-any-return]


@contextmanager
def faults_named(what: str, source: str) -> Iterator[None]:
    """Turn an error that arises in a user's file into one sentence with file and line.

    For code that takes part in the training itself, an algorithm: it is given what it changes, and no state is put
    back.

    Raises:
        RunError: an error of the file's; any other is raised as it is.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        line = line_in(error, source)
        if line is None or isinstance(error, LowmemError) or is_memory_fault(error):
            raise
        raise RunError(f"{what} failed in {source}, line {line}: {_described(error)}") from error


def finished(result: Any, seconds: float | None) -> Any:
    """Return what an asynchronous function gives; where a loop runs already (as in a notebook), from a thread.

    Raises:
        TimeLimitExceeded: it takes longer than so many seconds.
    """

    async def awaited() -> Any:
        try:
            async with asyncio.timeout(seconds) as limit:
                return await result
        except TimeoutError:
            if limit.expired():
                raise TimeLimitExceeded from None
            raise

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    return _in_thread(lambda: asyncio.run(awaited()))


def _in_thread(work: Callable[[], T]) -> T:
    """Return what work gives in a thread, which is left behind where the time limit ends the wait for it."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # the program does not wait for it at its end
    thread.start()
    try:
        thread.join()
    except TimeLimitExceeded:
        if thread.ident is not None:
            raise_in(thread.ident)
        raise
    if errors:
        raise errors[0]
    return outcome[0]


@contextmanager
def _noted(stops: list[BaseException]) -> Iterator[None]:
    """Note what handlers of signals raise, to tell Ctrl-C from a KeyboardInterrupt that a function raises itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def noting(handler: Callable[[int, Any], Any]) -> Callable[[int, Any], None]:
        def note(number: int, frame: Any) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                stops.append(error)
                raise

        return note

    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        for number, handler in before.items():
            signal.signal(number, noting(handler))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_fault(error: BaseException, what: str, source: str, seconds: float | None) -> NoReturn:
    """Raise an error of a call again: as it is where it is not the function's fault."""
    ours = isinstance(error, FunctionFault | FolderGone) or (
        isinstance(error, LowmemError) and not isinstance(error, RunError)
    )
    if ours or is_memory_fault(error):
        raise error
    line = line_in(error, source)
    place = "" if line is None else f" in {source}, line {line}"
    if isinstance(error, TimeLimitExceeded):
        raise FunctionFault(
            f"{what} did not return within its time limit of {seconds:g} seconds{place and f' (it was{place})'}; make "
            "it faster, or raise its timeout",
            timed_out=True,
        ) from error
    if isinstance(error, RunError):
        raise FunctionFault(f"{what}: {error}") from error
    raise FunctionFault(f"{what} failed{place}: {_described(error)}") from error


def _described(error: BaseException) -> str:
    try:
        return describe(error)
    except Exception:  # an error of the user's may fail to say what it is
        return type(error).__name__


def is_memory_fault(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that the device's memory ran out (not the host's)."""
    if "torch" not in sys.modules:
        return False
    from lowmem_rlhf.hardware.memory import is_out_of_memory

    both = [one for one in (error, error.__cause__) if isinstance(one, RuntimeError)]
    return any(is_out_of_memory(one) for one in both)
