"""Training from Python: a run as one call, or step by step in the caller's own loop."""

import gc
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.api.request import Overrides, RecipeLike, RewardLike, request_of
from lowmem_rlhf.api.run import Run
from lowmem_rlhf.display.run_display import display_for, steps_shown
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.progress import shown_by
from lowmem_rlhf.quiet import hushed
from lowmem_rlhf.recipe.python_objects import given
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.session import train as session

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.training.loop import Loop, StepOutput


def train(
    recipe: RecipeLike,
    *,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    eval_data: Any = None,
    rewards: Sequence[RewardLike] | None = None,
    overrides: Overrides = (),
    output: str | Path | None = None,
    resume: bool = False,
    progress: Any = "auto",
) -> Run:
    """Run a recipe and return the finished run.

    Args:
        recipe: the name of a shipped recipe, a path, a dict of a recipe's keys, or a `Recipe`.
        model: in place of the recipe's: a Hub id, a folder, a ``.gguf`` file, or a causal language model of
            transformers that is loaded already, which then is the one copy of the base and belongs to the run.
        tokenizer: of a loaded model; it has to be the one of the model's files.
        data: in place of the recipe's: a path or Hub id, rows (any iterable of mappings), a `datasets.Dataset`, a
            DataFrame, or a mapping of splits (``train``, and ``eval`` or ``test``) to any of these.
        eval_data: held-out data, likewise; absent: rows are held out of ``data``.
        rewards: in place of the recipe's: names, functions ``f(prompts, completions, **columns) -> list``, pairs of
            either with a weight, or dicts with ``function``, ``name``, ``weight`` and ``options``.
        overrides: further changes, as on the command line (``["training.max_steps=50"]``) or by key
            (``{"training.max_steps": 50}``).
        output: the run's folder; absent: ``runs/NAME``.
        resume: go on from the last checkpoint of the run that is there; what was given as objects is given again.
        progress: ``"auto"`` (bars in a terminal, lines in a pipe, a table in Jupyter), None for silence, or an object
            with the methods ``phase(name, done, total)`` and ``message(text)``.

    Raises:
        UserError: the input is wrong; nothing was trained. Its ``exit_code`` is 2.
        RunError: the run had begun and failed; a note says which step is kept. Its ``exit_code`` is 1.
    """
    display = display_for(progress)
    with shown_by(display), hushed(display.message):
        request = request_of(
            recipe,
            model=model,
            tokenizer=tokenizer,
            data=data,
            eval_data=eval_data,
            rewards=rewards,
            overrides=overrides,
        )
        for note in request.notes:
            display.message(note)
        with given(request.objects):
            try:
                directory = session.train(request.recipe, _path(output), resume, display, request.loaded)
            finally:
                _free()
    return Run(directory.path, request.objects, progress)


class Trainer:
    """A run whose loop is the caller's: every iteration is a finished step.

    ``for step in Trainer("quickstart"): print(step.metrics["reward/mean"])``. Held-out evaluation before and after,
    checkpoints, the report and the adapter are a part of the iteration, as of `train`. Whoever breaks out leaves a
    checkpoint of the last finished step, from which ``resume=True`` goes on.

    Attributes:
        recipe: as it runs.
        plan: the chosen settings with their reasons.
    """

    def __init__(
        self,
        recipe: RecipeLike,
        *,
        model: Any = None,
        tokenizer: Any = None,
        data: Any = None,
        eval_data: Any = None,
        rewards: Sequence[RewardLike] | None = None,
        overrides: Overrides = (),
        output: str | Path | None = None,
        resume: bool = False,
        progress: Any = "auto",
    ) -> None:
        """Check, plan and load; the arguments are those of `train`.

        Raises:
            UserError: the input is wrong, or the recipe trains a classifier, which has no steps of this kind.
        """
        self._progress, self._display = progress, display_for(progress)
        self._objects: dict[str, Any] = {}
        self._loop: Loop | None = None
        with self._inside():
            request = request_of(
                recipe,
                model=model,
                tokenizer=tokenizer,
                data=data,
                eval_data=eval_data,
                rewards=rewards,
                overrides=overrides,
            )
            self._objects = request.objects
            for note in request.notes:
                self._display.message(note)
        with self._inside():
            if request.recipe.spec.run is not None:
                raise UserError(
                    f"algorithm: a {request.recipe.spec.title} is trained as a whole; take lowmem_rlhf.train and "
                    "not Trainer"
                )
            checked = session.check(request.recipe, _path(output), resume, self._display)
            planned = session.plan(checked, self._display)
            self.plan: Plan = planned.plan
            self._loop = session.open_run_of(planned, self._display, request.loaded)
        self.recipe: Recipe = self._loop.recipe
        self._directory = self._loop.run
        self._steps: Generator[StepOutput, None, None] | None = None  # those that are being iterated

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self._directory.path

    @property
    def base(self) -> "SharedBase":
        """The shared base with its roles, until the run ends or is closed."""
        return self._open.base

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self._open.step

    @property
    def run(self) -> Run:
        """The run as it lies on the disk by now."""
        return Run(self.path, self._objects, self._progress)

    @property
    def _open(self) -> "Loop":
        if self._loop is None:
            raise UserError(f"the trainer of {self.path} is closed; make another one with resume=True to go on")
        return self._loop

    def __iter__(self) -> "Iterator[StepOutput]":
        """Yield the steps that are left, each with ``metrics`` (as in metrics.jsonl) and ``samples``.

        Raises:
            RunError: the run failed; a note says which step is kept.
        """
        loop = self._open
        steps = self._steps = loop.steps(self._display)
        with steps_shown(self._display, self.recipe.training.max_steps, loop.step):
            try:
                while True:
                    with self._inside():
                        finished = next(steps, None)
                    if finished is None:
                        break
                    self._display.step(finished.metrics)
                    yield finished
                    if self._loop is None:  # closed by the caller
                        return
            finally:
                with self._inside():
                    steps.close()
        with self._inside():
            session.finish(loop, self._display)
        del loop, steps
        self.close()

    def close(self) -> None:
        """Save what is finished and free the base and everything on the device; others may go on with the run then."""
        if self._steps is not None:  # a loop that was left without an end
            with self._inside(), suppress(ValueError):  # it runs: its own end will do it
                self._steps.close()
        if self._loop is not None:
            self._loop.run.unlock()
        self._loop, self._steps = None, None
        _free()

    def __enter__(self) -> "Trainer":
        """Return the trainer, which is closed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Let what runs inside report to the display, find the program's objects, and keep other libraries quiet."""
        with shown_by(self._display), hushed(self._display.message), given(self._objects):
            yield


def _path(output: str | Path | None) -> Path | None:
    if output is None:
        return None
    if not isinstance(output, str | Path) or not str(output):
        raise UserError(f"output: got {output!r}; give the folder of the run, for example 'runs/NAME'")
    return Path(output)


def _free() -> None:
    """Give the memory of a run back, so that the next one finds it."""
    import torch

    from lowmem_rlhf.hardware.memory import release

    gc.collect()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    release(accelerator or torch.device("cpu"))
