"""Whatever ends a run, and whenever: the note on the error says what is on the disk; a resume goes on from there."""

import re

import pytest
from safetensors.torch import load_file
from training_cases import recipe_of, train, trainer_of

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training import loop
from lowmem_rlhf.training.online import CompletionEvaluator, Trainer
from lowmem_rlhf.training.optimizer import Optimizer


def stop_at(patch, owner, name, call, error, after=False):
    """Let a function raise at its n-th call: before it does its work or behind it."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def stopping(*args, **given):
        now = next(calls) == call
        if now and not after:
            raise error
        result = real(*args, **given)
        if now:
            raise error
        return result

    patch.setattr(owner, name, stopping)


# what stops, at which call, before or behind its work -> the last step on disk, and what the note says is lost;
# four steps of two optimizer steps each, a checkpoint after the second
MOMENTS = {
    "evaluation before": (CompletionEvaluator, "evaluate", 1, False, 0, ""),
    "the first rollout": (Trainer, "_rollout", 1, False, 0, ""),
    "before the first optimizer step": (Optimizer, "step", 1, False, 0, ""),
    "between the first optimizer steps": (Optimizer, "step", 1, True, 0, ""),
    "behind the first optimizer steps": (Optimizer, "step", 2, True, 0, ""),
    "the second step, not begun": (Trainer, "_rollout", 2, False, 1, ""),
    "the second step, begun": (Optimizer, "step", 3, True, 1, ""),
    "a row of the second step's metrics": (RunDirectory, "log_metrics", 2, False, 2, ""),
    "saving": (loop, "save_checkpoint", 1, False, 2, ""),
    "behind saving": (loop, "save_checkpoint", 1, True, 2, ""),
    "the fourth step, not begun": (Optimizer, "step", 7, False, 3, ""),
    "the fourth step, begun": (Optimizer, "step", 7, True, 3, ""),
    "evaluation after": (CompletionEvaluator, "evaluate", 2, False, 4, ""),
    "the adapter": (RunDirectory, "new_adapter", 1, False, 4, ""),
}


@pytest.fixture(scope="module")
def recipe(model_folder):
    return recipe_of(model_folder, grpo={"num_iterations": 2}, training={"save_steps": 2})


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    trainer = trainer_of(recipe, tmp_path_factory.mktemp("runs") / "whole")
    train(trainer)
    return adapter(trainer.run)


def adapter(run):
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def note(error):
    (said,) = error.__notes__
    return said


BEGUN, NOT_BEGUN = "the fourth step, begun", "the fourth step, not begun"
OTHERS = [(moment, error) for moment in (BEGUN, NOT_BEGUN) for error in (RunError("no"), ZeroDivisionError("a bug"))]


@pytest.mark.parametrize(
    ("moment", "error"), [*((moment, KeyboardInterrupt()) for moment in MOMENTS), *OTHERS], ids=str
)
def test_the_note_is_what_is_on_the_disk(recipe, tmp_path, monkeypatch, uninterrupted, moment, error):
    owner, name, call, after, kept, lost = MOMENTS[moment]
    trainer = trainer_of(recipe, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, call, error, after)
        with pytest.raises(type(error)) as caught:
            train(trainer)
    said, latest = note(caught.value), trainer.run.latest_checkpoint()
    assert (latest[0] if latest else 0) == kept
    assert said.startswith(
        f"step {kept} is kept, --resume goes on" if kept else "no step is kept, --resume starts over"
    )
    assert said.partition("; ")[2] == lost
    assert not (trainer.run.path / "adapter").exists()
    rows = [row["step"] for row in trainer.run.metrics()]
    assert rows == list(range(1, kept + 1)) and {row["step"] for row in trainer.run.samples()} == set(rows)
    if isinstance(error, KeyboardInterrupt) and kept in (0, 1, 3) and "optimizer" not in moment:
        resumed = trainer_of(recipe, tmp_path / "run", resume=True)
        assert resumed.step == kept
        train(resumed)
        assert all(tensor.equal(uninterrupted[key]) for key, tensor in adapter(resumed.run).items())


def test_steps_that_cannot_be_saved_are_told_as_lost(recipe, tmp_path, monkeypatch):
    def full(*args, **given):
        raise OSError(28, "No space left on device")

    trainer = trainer_of(recipe, tmp_path / "run")
    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(OSError) as caught:
        train(trainer)
    assert trainer.run.latest_checkpoint() is None
    lost = r"steps 1 to 2 are lost, as they could not be saved \(.*No space left.*\)"
    assert re.fullmatch(f"no step is kept, --resume starts over; {lost}", note(caught.value))


def test_a_second_ctrl_c_while_the_steps_are_saved(recipe, tmp_path, monkeypatch):
    def impatient(*args, **given):
        raise KeyboardInterrupt

    trainer = trainer_of(recipe, tmp_path / "run")
    stop_at(monkeypatch, Trainer, "_rollout", 2, KeyboardInterrupt())
    monkeypatch.setattr(loop, "save_checkpoint", impatient)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(trainer)
    assert note(caught.value).endswith("step 1 is lost, as they could not be saved (KeyboardInterrupt)")


def test_a_resumed_run_that_stops_at_once_still_has_what_it_began_with(recipe, tmp_path, monkeypatch):
    trainer = trainer_of(recipe, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, Trainer, "_rollout", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(trainer)
    again = trainer_of(recipe, tmp_path / "run", resume=True)
    stop_at(monkeypatch, Optimizer, "step", 1, RunError("it failed"), after=True)
    with pytest.raises(RunError) as caught:
        train(again)
    assert note(caught.value) == "step 2 is kept, --resume goes on from it"
