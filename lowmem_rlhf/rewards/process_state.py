"""The state of the process that a user's function may change for itself alone: it is as before after each call.

Left as they are: new environment variables (a library that was set up in the first call reads them in the next),
imported modules, and what file descriptors point to. Loads without torch.
"""

import contextlib
import gc
import hashlib
import io
import locale
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.stopping import SIGNALS

Part = tuple[Callable[[], Any], Callable[[Any], object]]  # what reads a part of the state, and what sets it

_PATH: Part = (lambda: list(sys.path), lambda value: sys.path.__setitem__(slice(None), value))
_HANDLED = SIGNALS + tuple(getattr(signal, name) for name in ("SIGALRM", "SIGURG") if hasattr(signal, name))
_NEAR = 0.1  # seconds by which two readings of one alarm differ at most
_inference_modes: list[Any] = []  # held, as the mode ends with its object


class FolderGone(RunError):
    """The folder that a run works in is not there any more."""


@contextmanager
def preserved(path: bool = True) -> Iterator[None]:
    """Put the state of the process back at the end of the block, however it ends.

    These are: gradient and inference mode, autocast, default type and device, threads, deterministic algorithms and
    anomaly detection of torch, NumPy's handling of errors, the current folder, ``sys.path``, the standard streams,
    environment variables that there were, filters of warnings, logging, locale, recursion limit, garbage collection,
    and in the main thread signal handlers and the alarm.

    Args:
        path: also ``sys.path``; False while a user's file is imported, whose functions may import more later.

    Raises:
        FolderGone: the current folder is.
    """
    parts = [*([_PATH] if path else []), *_parts()]
    values = [read() for read, _ in parts]
    streams = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    environment, alarm = dict(os.environ), _Alarm()
    with warnings.catch_warnings():
        for name in ("stdout", "stderr"):
            if streams[name] is not None:
                setattr(sys, name, Unclosable(streams[name]))
        try:
            yield
        finally:
            for name, stream in streams.items():
                setattr(sys, name, stream)
            if changed := {key: text for key, text in environment.items() if os.environ.get(key) != text}:
                os.environ.update(changed)
            for (read, write), value in zip(parts, values, strict=True):
                if read() != value:
                    write(value)
            alarm.restore()


class Unclosable:
    """A standard stream that a function may write to, and that stays open when it is closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def __enter__(self) -> "Unclosable":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write out what is waiting."""
        self._stream.flush()

    def detach(self) -> Any:
        """Refuse: the stream would be of no use afterwards."""
        raise io.UnsupportedOperation("detach")


RandomStates = list[tuple[Callable[[Any], object], Any]]


@contextmanager
def seeded(key: str) -> Iterator[None]:
    """Let what runs in the block draw random numbers (Python's, NumPy's, torch's) that follow from a key and the run.

    What it seeds or draws changes neither the run's numbers nor those of another function, and a step that is taken
    again, or a run that is resumed, draws what it drew before. The run's part of the key is its global random state,
    from which no work of this package draws.
    """
    before = random_states()
    text = f"{key}/{random.getstate()[1][:8]}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)
    if (torch := _torch()) is not None:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_states(before)


class _Alarm:
    """The alarm that was set before a call: it rings when it would have; one that a function leaves does not."""

    def __init__(self) -> None:
        self._began, self._left, self._interval = time.monotonic(), *_alarm()

    def restore(self) -> None:
        """Set it again, unless the function left it alone."""
        left, interval = _alarm()
        due = self._left - (time.monotonic() - self._began) if self._left else 0.0
        if (left or self._left) and (abs(left - due) > _NEAR or interval != self._interval):
            signal.setitimer(signal.ITIMER_REAL, max(due, _NEAR) if self._left else 0.0, self._interval)


def _alarm() -> tuple[float, float]:
    """Return the seconds to the alarm and between later ones; 0 for none, as on Windows, which has no alarms."""
    return signal.getitimer(signal.ITIMER_REAL) if hasattr(signal, "getitimer") else (0.0, 0.0)


def new_threads(before: set[int | None]) -> list[str]:
    """Return the names of the running threads that are not among these and that the program would wait for at its end.

    Those of a pool of ``concurrent.futures`` end by themselves.
    """
    return [
        one.name
        for one in threading.enumerate()
        if one.ident not in before and not one.daemon and not one.name.startswith("ThreadPoolExecutor")
    ]


def random_states() -> RandomStates:
    """Return what sets each global generator (Python's, NumPy's, torch's), with its state."""
    states: RandomStates = [(random.setstate, random.getstate())]
    if (numpy := sys.modules.get("numpy")) is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    if (torch := _torch()) is None:
        return states
    states.append((torch.set_rng_state, torch.get_rng_state()))
    accelerator = torch.accelerator.current_accelerator()
    module = torch.get_device_module(accelerator) if accelerator is not None else None
    if module is not None and getattr(module, "is_initialized", lambda: True)():
        of_all = hasattr(module, "get_rng_state_all")
        read, write = ("get_rng_state_all", "set_rng_state_all") if of_all else ("get_rng_state", "set_rng_state")
        states.append((getattr(module, write), getattr(module, read)()))
    return states


def set_random_states(states: RandomStates) -> None:
    """Set the global generators to what `random_states` returned."""
    for write, value in states:
        write(value)


def _parts() -> list[Part]:
    parts: list[Part] = [
        (sys.getrecursionlimit, sys.setrecursionlimit),
        (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        (lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value)),
        (lambda: logging.root.manager.disable, logging.disable),
        _of_logger(logging.root),
        _of_logger(logging.getLogger("lowmem_rlhf")),
    ]
    if (numpy := sys.modules.get("numpy")) is not None:
        parts.append((numpy.geterr, lambda value: numpy.seterr(**value)))
    if (torch := _torch()) is not None:
        parts += _of_torch(torch)
    if threading.current_thread() is threading.main_thread():
        parts += [_of_signal(number) for number in _HANDLED]
    return [*parts, (_folder, _go_back)]  # the last, as it may fail


def _torch() -> Any:
    """Return torch where it has been imported as a whole; None elsewhere."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "accelerator") else None


def _of_torch(torch: Any) -> list[Part]:
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu",) if accelerator is None else ("cpu", accelerator.type)

    def inference(on: bool) -> None:
        _inference_modes.append(torch._C._InferenceMode(on))

    def deterministic() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def on_cpu(device: Any) -> bool:
        return capabilities(device).on_cpu

    def set_autocast(values: list[tuple[bool, Any]]) -> None:
        for kind, (on, dtype) in zip(kinds, values, strict=True):
            torch.set_autocast_enabled(kind, on)
            torch.set_autocast_dtype(kind, dtype)

    return [
        (torch.is_inference_mode_enabled, inference),  # before the gradient mode, which it changes
        (torch.is_grad_enabled, torch._C._set_grad_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, lambda value: torch.set_default_device(None if on_cpu(value) else value)),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
        *(_of_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
        (lambda: [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds], set_autocast),
    ]


def _of_attribute(owner: Any, name: str) -> Part:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _of_logger(logger: logging.Logger) -> Part:
    def write(value: tuple[int, list[logging.Handler], bool, bool]) -> None:
        logger.setLevel(value[0])
        logger.handlers[:], logger.propagate, logger.disabled = value[1:]

    return lambda: (logger.level, list(logger.handlers), logger.propagate, logger.disabled), write


def _of_signal(number: int) -> Part:
    def write(handler: Any) -> None:
        if handler is not None:  # one that was not set from Python cannot be set again
            signal.signal(number, handler)

    return lambda: signal.getsignal(number), write


def _folder() -> str | None:
    with contextlib.suppress(OSError):
        return os.getcwd()
    return None


def _go_back(folder: str | None) -> None:
    if folder is None:  # it was gone before
        return
    try:
        os.chdir(folder)
    except OSError as error:
        raise FolderGone(f"the folder {folder} that the run works in cannot be entered any more: {error}") from error
