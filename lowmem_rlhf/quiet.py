"""Keeping what other libraries say about themselves out of the user's sight."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lowmem_rlhf.plain_text import harmless

LIBRARIES = ("bitsandbytes", "transformers", "datasets", "accelerate")
_WARNINGS_OF = r"(bitsandbytes|torch|peft|transformers|accelerate|datasets|tqdm)(\.|$)"
_OURS = "lowmem_rlhf"


def hush() -> None:
    """Silence other libraries for the rest of this process, as the command line does; our own warnings are printed."""
    for name, value in _environment().items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler()
    handler.setFormatter(_Harmless("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=_WARNINGS_OF)


@contextmanager
def hushed(message: Callable[[str], None]) -> Iterator[None]:
    """Silence other libraries inside the block and give our own warnings to ``message``; then all is as before."""
    loggers = {name: logging.getLogger(name) for name in LIBRARIES}
    levels = {name: logger.level for name, logger in loggers.items()}
    ours, handler = logging.getLogger(_OURS), _Forwarding(message)
    propagate, added = ours.propagate, [key for key in _environment() if key not in os.environ]
    os.environ.update({key: _environment()[key] for key in added})
    ours.addHandler(handler)
    ours.propagate = False
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_WARNINGS_OF)
            yield
    finally:
        ours.removeHandler(handler)
        ours.propagate = propagate
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        for key in added:
            os.environ.pop(key, None)


class _Harmless(logging.Formatter):
    """Messages hold names of columns and files, which may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


class _Forwarding(logging.Handler):
    def __init__(self, message: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._message = message

    def emit(self, record: logging.LogRecord) -> None:
        self._message(record.getMessage())


def _environment() -> dict[str, str]:
    bars = {} if sys.stderr is not None and sys.stderr.isatty() else {"TQDM_DISABLE": "1"}  # the libraries' bars
    return {"TOKENIZERS_PARALLELISM": "false", "BITSANDBYTES_NOWELCOME": "1", **bars}
