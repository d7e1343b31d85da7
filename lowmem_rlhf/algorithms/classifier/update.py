"""A run that trains a sequence classifier for the `classifier` reward; its run directory is that of any run.

There is no shared base: the whole model trains in fp32 (see `algorithms.classifier.fit`), and ends up in RUN/model.
"""

import math
import time
from pathlib import Path

from lowmem_rlhf.algorithms.classifier.fit import train_classifier
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
    run: RunDirectory | None = None  # made after the first step, before which the model or the texts may be refused
    start = LearnedReward(
        model=recipe.model,
        revision=recipe.revision,
        device=device.torch_device,
        max_length=recipe.classifier.max_length,
        batch_tokens=recipe.classifier.batch_tokens,
    )
    before = time.perf_counter()
    with steps_shown(display, recipe.training.max_steps, 0):

        def progress(step: int, steps: int, loss: float) -> None:
            nonlocal before, run
            if run is None:
                run = RunDirectory.create(path, recipe, plan, False, run_inputs(recipe, {"": SplitRows(rows, kept)}))
                display.message(f"run directory: {run.path}")
            now = time.perf_counter()
            metrics = {"step": step, "loss": loss, "time/step": now - before}
            before = now
            run.log_metrics(metrics)
            display.step(metrics)

        try:
            report = train_classifier(data, path / MODEL, start, recipe.training, epochs, held_out, progress)
        except KeyboardInterrupt as stop:
            other = f" with another --output than {path}" if run else ""
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
            if run is not None:
                run.unlock()
    assert run is not None
    if report.held_out:
        run.write_evaluation({"after": {**report.held_out, "problems": len(held_out[0])}})
        display.evaluation(run.evaluation())
    html.write_report(run)
    return run
