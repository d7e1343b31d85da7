"""A run that trains a sequence classifier for the `classifier` reward; its run directory is that of any run.

There is no shared base: the whole model trains in fp32 (see `algorithms.classifier.fit`), and ends up in RUN/model.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowmem_rlhf.algorithms.classifier.fit import ClassifierReport, Measure, train_classifier
from lowmem_rlhf.data.bad_rows import RowReport
from lowmem_rlhf.data.provenance import run_inputs
from lowmem_rlhf.data.sources import SplitRows, load_rows
from lowmem_rlhf.data.supervised import labelled_texts
from lowmem_rlhf.display.run_display import RunDisplay, steps_shown
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.hardware.memory import is_out_of_memory
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import LearnedReward
from lowmem_rlhf.report import html
from lowmem_rlhf.run.directory import MODEL, RunDirectory
from lowmem_rlhf.run.held_out import ACCURACY, DURING, metrics_of
from lowmem_rlhf.training.held_out import HeldOut, check_metric


def train_classifier_run(recipe: Recipe, path: Path, resume: bool, display: RunDisplay) -> RunDirectory:
    """Train a classifier and return its run directory.

    Raises:
        UserError: the data or the model does not suit; or ``resume``, which a run of minutes does not have.
        RunError: numbers were not finite, nothing was learned, or memory ran out.
        KeyboardInterrupt: the user stopped it; a note says that it cannot be continued.
    """
    if resume:
        raise UserError("--resume: a classifier's run cannot be continued; start it anew with another --output")
    RunDirectory.check(path, recipe, resume)
    rows = load_rows(recipe.data, "train", recipe.training.seed)
    kept = load_rows(recipe.data, "eval", recipe.training.seed) if recipe.data.eval_size else []
    data = labelled_texts(rows, recipe.data)
    held_out: tuple[list[str], list[str]] = ([], [])
    if kept:
        held_out = labelled_texts(kept, recipe.data, RowReport(recipe.data, recipe.data.eval or ""))
    size = recipe.training.prompts_per_step
    epochs = recipe.training.num_train_epochs or max(1, round(recipe.training.max_steps * size / len(data[0])))
    if recipe.training.num_train_epochs is None:
        display.message(f"a classifier trains whole epochs: {epochs} of {math.ceil(len(data[0]) / size)} steps")
    length = {"num_train_epochs": epochs, "max_steps": epochs * math.ceil(len(data[0]) / size)}
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=length)})
    device = detect(recipe.hardware.device)
    plan = {"device": device.to_dict(), "settings": {"quantization": "none"}}
    start = LearnedReward(
        model=recipe.model,
        revision=recipe.revision,
        device=device.torch_device,
        max_length=recipe.classifier.max_length,
        batch_tokens=recipe.classifier.batch_tokens,
    )
    check_metric(recipe, ("loss", "accuracy", *(f"accuracy/{label}" for label in sorted(set(held_out[1])))))
    record = _Record(
        recipe,
        display,
        lambda: RunDirectory.create(path, recipe, plan, False, run_inputs(recipe, {"": SplitRows(rows, kept)})),
        {"problems": len(held_out[0]), "headline": ACCURACY},
    )
    with steps_shown(display, recipe.training.max_steps, 0):
        try:
            report = train_classifier(
                data, path / MODEL, start, recipe.training, epochs, held_out, record.step, record.evaluate
            )
        except KeyboardInterrupt as stop:
            other = f" with another --output than {path}" if record.run else ""
            stop.add_note(f"a classifier's run cannot be continued: start it anew{other}")
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                "the device's memory ran out while the classifier's weights were changed; set hardware.device=cpu, or "
                "take a smaller model"
            ) from error
        finally:
            if record.run is not None:
                record.run.unlock()
    run = record.end(report)
    html.write_report(run)
    return run


class _Record:
    """What a classifier's run writes and shows after each step.

    Args:
        recipe: with its steps.
        display: where it is shown.
        begin: makes the run directory; after the first step, before which the model or the texts may be refused.
        more: what results hold beside what was measured.
    """

    def __init__(
        self, recipe: Recipe, display: RunDisplay, begin: Callable[[], RunDirectory], more: dict[str, Any]
    ) -> None:
        self._recipe, self._display, self._begin, self._more = recipe, display, begin, more
        self.run: RunDirectory | None = None
        self._results: HeldOut | None = None
        self._metrics: dict[str, Any] = {}
        self._before = time.perf_counter()

    def step(self, step: int, steps: int, loss: float) -> None:
        """Put a step on record."""
        if self.run is None:
            self.run = self._begin()
            self._results = HeldOut(self._recipe, self.run)
            for sentence in filter(None, (f"run directory: {self.run.path}", self._results.remark)):
                self._display.message(sentence)
        now = time.perf_counter()
        self._metrics = {"step": step, "loss": loss, "time/step": now - self._before}
        self._before = now
        self.run.log_metrics(self._metrics)

    def evaluate(self, step: int, measure: Measure) -> bool:
        """Evaluate after a step if that is due, and show the step; return whether training ends."""
        results = self._results
        assert results is not None
        evaluated, ended = {}, ""
        if results.due(step):
            results.add(DURING, {**measure(), **self._more}, step)
            results.write()
            self._display.message(results.shown(step))
            evaluated, ended = metrics_of(results.row(step) or {}), results.ends(step)
            self._before = time.perf_counter()
        self._display.step({**self._metrics, **evaluated})
        if ended:
            self._display.message(ended)
        return bool(ended)

    def end(self, report: ClassifierReport) -> RunDirectory:
        """Put the last evaluation on record; return the run directory."""
        assert self.run is not None and self._results is not None
        if report.held_out:
            self._results.end({**report.held_out, **self._more}, len(report.losses))
            self._results.write()
            self._display.evaluation(self.run.evaluation())
        return self.run
