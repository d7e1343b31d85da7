"""Keeping what libraries say about themselves out of the user's sight."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def hush(loggers: Sequence[str] = ("bitsandbytes", "transformers", "datasets", "accelerate")) -> None:
    """Keep what the libraries say about themselves out of the user's sight; our own warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(bitsandbytes|torch|peft|transformers|accelerate)(\.|$)")
