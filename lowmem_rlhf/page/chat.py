"""A finished run's policy and its reference, asked from the page: one model at a time, loaded when it is asked."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.page.followed import Followed
from lowmem_rlhf.page.source import RunSource, shown
from lowmem_rlhf.run.reading import ADAPTER

LONGEST = 20_000  # characters of a prompt
IDLE = 300.0  # seconds without a question, after which the model's memory is given back
_NO_CARD = ("", "cpu")

OpenRun = Callable[[Path], Any]  # -> api.run.Run


class Chat:
    """What answers; questions wait for each other.

    Args:
        open_run: `api.run.open_run`.
        followed: the runs that are watched: while one of them trains on a card, no model is loaded beside it.
    """

    def __init__(self, open_run: OpenRun, followed: Followed) -> None:
        self._open_run, self._followed = open_run, followed
        self._lock = Lock()
        self._opened: tuple[Any, Any] | None = None  # which adapter, and the run
        self._idle: Timer | None = None

    @property
    def holds_model(self) -> bool:
        """Whether a model is loaded, or being loaded."""
        return self._lock.locked() or self._opened is not None

    def ask(self, source: RunSource, prompt: Any, task: Any = None) -> dict[str, Any]:
        """Return ``policy`` and ``reference``, the likeliest answer of each, and the ``seconds`` that they took.

        Args:
            source: the run.
            prompt: what a user types.
            task: of a run with several, the one whose prompts are written; None: the first.

        Raises:
            UserError: the prompt is none, the run is not finished or has no policy, or another run is training.
            RunError: the device's memory ran out.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError("prompt: give a text to answer")
        if len(prompt) > LONGEST:
            raise UserError(f"prompt: it has {len(prompt):,} characters; at most {LONGEST:,} are taken")
        if task is not None and not isinstance(task, str):
            raise UserError("task: give the name of one")
        began = time.monotonic()
        with self._lock:
            self._check(source)
            try:
                answers = self._run(source.path).generate(prompt, compare=True, task=task)
            except UserError:
                raise
            except BaseException:
                self._free()
                raise
            finally:
                self._free_later()
        told = {role: texts[0] for role, texts in answers.items()}
        return shown({**told, "seconds": round(time.monotonic() - began, 2)})

    def close(self) -> None:
        """Free the model, if one is loaded and not in use."""
        if self._lock.acquire(blocking=False):
            try:
                self._free()
            finally:
                self._lock.release()

    def _check(self, source: RunSource) -> None:
        told = source.summary()
        path = told["path"]
        if told["state"] != "finished":
            raise UserError(f"{path} is {told['state']}; a run can be talked to once it is finished")
        if told["device"] in _NO_CARD:
            return
        training = [run for run in self._followed.list() if run["state"] == "running" and run["device"] not in _NO_CARD]
        if training:
            raise UserError(
                f"{training[0]['path']} is training, and a second model could take the memory that it needs; wait for "
                f"its end, or take the CPU: `lowmem-rlhf chat {path} --compare --device cpu`"
            )

    def _run(self, path: Path) -> Any:
        """Return the opened run; another one, or one with another adapter by now, takes its place."""
        which = path, (path / ADAPTER).stat().st_mtime_ns if (path / ADAPTER).is_dir() else None
        if self._opened is None or self._opened[0] != which:
            self._free()
            self._opened = which, self._open_run(path)
        return self._opened[1]

    def _free(self) -> None:
        if self._opened is not None:
            run, self._opened = self._opened[1], None
            run.close()

    def _free_later(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = Timer(IDLE, self.close)
        self._idle.daemon = True
        self._idle.start()
