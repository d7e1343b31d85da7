"""Whatever ends a run, and whenever: the note on the error says what is on the disk; a resume goes on from there."""

import json
import random
import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training_cases import recipe_of, train, trainer_of

from lowmem_rlhf import files
from lowmem_rlhf.engine import roles
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training import loop
from lowmem_rlhf.training.online import CompletionEvaluator, Trainer
from lowmem_rlhf.training.optimizer import Optimizer
from lowmem_rlhf.training.trained_state import StateKeeper


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


@contextmanager
def largest_file(size):
    """Let the system refuse files larger than so many bytes, for real."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_that_the_disk_refuses_leaves_the_one_before_whole(recipe, tmp_path, uninterrupted, name):
    trainer = trainer_of(recipe, tmp_path / "run")
    steps = trainer.steps(Quiet())
    for _ in range(3):  # the second step is saved
        next(steps)
    size = (trainer.run.path / "checkpoints" / "step-2" / name).stat().st_size
    with largest_file(size - 1), pytest.raises(RunError) as caught:
        list(steps)
    cause = "the file would be larger than allowed; raise the limit"
    assert re.search(f"step-4 cannot be written: {cause}.*then go on with --resume", str(caught.value))
    assert note(caught.value).startswith(
        "step 2 is kept, --resume goes on from it; steps 3 to 4 are lost, as they could"
    )
    assert [path.name for path in (trainer.run.path / "checkpoints").iterdir()] == ["step-2"]
    resumed = trainer_of(recipe, tmp_path / "run", resume=True)
    train(resumed)
    assert all(tensor.equal(uninterrupted[key]) for key, tensor in adapter(resumed.run).items())


class Quiet:
    def phase(self, name, done=0, total=None):
        pass

    def message(self, text):
        pass


def test_an_adapter_that_the_disk_refuses_leaves_the_last_step(recipe, tmp_path, monkeypatch):
    trainer = trainer_of(recipe, tmp_path / "run")
    real = roles.save_file

    def full(tensors, path, **given):
        if path.parent.name == ".adapter.tmp":
            raise SafetensorError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "" }')
        real(tensors, path, **given)

    monkeypatch.setattr(roles, "save_file", full)
    with pytest.raises(RunError, match="adapter cannot be written: the disk is full; make room there") as caught:
        train(trainer)
    assert note(caught.value) == "step 4 is kept, --resume goes on from it"
    assert not list(trainer.run.path.glob("*adapter*"))


def test_a_checkpoint_without_room_says_so(recipe, tmp_path, monkeypatch):
    trainer = trainer_of(recipe, tmp_path / "run")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"step-2 needs 0\.\d MB and 0\.0 MB are free on that disk; make room there"):
        train(trainer)
    assert trainer.run.latest_checkpoint() is None


@pytest.fixture(scope="module")
def without_hashes(recipe, tmp_path_factory):
    """Return a run with checkpoints of the second and the fourth step as they were before they held hashes."""
    trainer = trainer_of(recipe, tmp_path_factory.mktemp("runs") / "old")
    train(trainer)
    for _, folder in trainer.run.checkpoints():
        values = json.loads((folder / "state.json").read_text())
        state = {key: values[key] for key in ("step", "optimizer", "counters")}
        (folder / "state.json").write_text(json.dumps(state))
    (trainer.run.path / "hashes.json").unlink()
    return trainer.run.path


def another_step(folder):
    shutil.copyfile(folder.with_name("step-2") / "optimizer.safetensors", folder / "optimizer.safetensors")


def another_shape(folder):
    tensors = load_file(folder / "optimizer.safetensors")
    key = next(name for name in tensors if name.endswith("|exp_avg"))
    save_file({**tensors, key: tensors[key].T.contiguous()}, folder / "optimizer.safetensors")


def another_name(folder):
    tensors = load_file(folder / "optimizer.safetensors")
    save_file({f"x{name}": tensor for name, tensor in tensors.items()}, folder / "optimizer.safetensors")


def one_step_ahead(folder):
    tensors = load_file(folder / "optimizer.safetensors")
    key = next(name for name in tensors if name.endswith("|step"))
    save_file({**tensors, key: tensors[key] + 1}, folder / "optimizer.safetensors")


def without_counters(folder):
    values = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**values, "counters": {}}))


FOREIGN = {
    another_step: "has taken 4 optimizer steps, and the schedule 8",
    another_shape: "does not fit: exp_avg of .* is",
    another_name: "which this run does not train",
    one_step_ahead: "has taken 9 optimizer steps, and the schedule 8",
    without_counters: "cannot be read .*learned_tokens",
}


@pytest.mark.parametrize("change", FOREIGN)
def test_a_foreign_optimizer_file_is_noticed_without_hashes_too(recipe, without_hashes, tmp_path, change):
    path = shutil.copytree(without_hashes, tmp_path / "run")
    change(path / "checkpoints" / "step-4")
    with pytest.raises(UserError, match=FOREIGN[change]):
        trainer_of(recipe, path, resume=True)


def test_a_cut_file_is_set_aside_without_hashes_too(recipe, without_hashes, tmp_path):
    path = shutil.copytree(without_hashes, tmp_path / "run")
    file = path / "checkpoints" / "step-4" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert trainer_of(recipe, path, resume=True).step == 2
    assert (path / "checkpoints" / "step-4.damaged").is_dir()


def test_a_card_that_stops_answering_loses_no_finished_step(recipe, tmp_path, monkeypatch):
    """What is saved lies in host memory; nothing is asked of the device."""
    trainer = trainer_of(recipe, tmp_path / "run")
    gone = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    def fails(*args, **given):
        for name in ("parameters", "tensors", "plain"):  # as any copy from the card would from now on
            monkeypatch.setattr(Optimizer, name, property(lambda self: (_ for _ in ()).throw(gone)), raising=False)
        raise gone

    real, calls = Trainer._rollout, iter(range(10))
    monkeypatch.setattr(Trainer, "_rollout", lambda *args: fails() if next(calls) else real(*args))
    with pytest.raises(
        RunError, match=r"the device failed in the rollout phase of step 2 \(CUDA error: an illegal mem"
    ):
        train(trainer)
    assert trainer.run.latest_checkpoint()[0] == 1


# The same object goes on after a failure


def test_the_loop_goes_on_after_an_interrupt_within_the_optimizer_steps(recipe, tmp_path, monkeypatch, uninterrupted):
    trainer = trainer_of(recipe, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, Optimizer, "step", 3, KeyboardInterrupt(), after=True)
        with pytest.raises(KeyboardInterrupt):
            train(trainer)
    train(trainer)
    assert [row["step"] for row in trainer.run.metrics()] == [1, 2, 3, 4]
    assert trainer.seen.completions == 4 * 16
    assert all(tensor.equal(uninterrupted[key]) for key, tensor in adapter(trainer.run).items())


def test_the_loop_goes_on_after_a_row_that_could_not_be_written(recipe, tmp_path, monkeypatch, uninterrupted):
    def full(*args, **given):
        raise RunError("no room")

    trainer = trainer_of(recipe, tmp_path / "run")
    real = RunDirectory.log_samples
    with monkeypatch.context() as patch:
        patch.setattr(
            RunDirectory, "log_samples", lambda run, step, rows: full() if step == 2 else real(run, step, rows)
        )
        with pytest.raises(RunError) as caught:
            train(trainer)
    assert "step 2 is lost" in note(caught.value) and [row["step"] for row in trainer.run.metrics()] == [1]
    train(trainer)
    assert [row["step"] for row in trainer.run.metrics()] == [1, 2, 3, 4]
    assert all(tensor.equal(uninterrupted[key]) for key, tensor in adapter(trainer.run).items())


def test_a_step_that_cannot_be_taken_back_at_once_is_taken_back_before_the_next(recipe, tmp_path, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError("out of memory")

    whole = trainer_of(recipe, tmp_path / "whole")
    train(whole)
    trainer, failures = trainer_of(recipe, tmp_path / "run"), iter([out_of_memory])
    real, steps = StateKeeper.put_back, iter(range(10**6))
    step = Optimizer.step

    def fails_once(self, *loss, **before):
        norm = step(self, *loss, **before)
        if next(steps) == 2:  # of the second step, whose weights have changed now
            out_of_memory()
        return norm

    monkeypatch.setattr(Optimizer, "step", fails_once)
    monkeypatch.setattr(StateKeeper, "put_back", lambda self: next(failures, lambda: real(self))())
    train(trainer)
    assert all(tensor.equal(adapter(whole.run)[key]) for key, tensor in adapter(trainer.run).items())
    assert [row["memory/retries"] for row in trainer.run.metrics()[1:]] == [2, 2, 2]


def test_a_step_that_is_taken_again_draws_what_it_drew_before(recipe, tmp_path, monkeypatch):
    def drawn(completions, **columns):
        return [random.random() for _ in completions]

    def rewards_of(name: str, fails: bool) -> list[float]:
        trainer = trainer_of(recipe, tmp_path / name, drawn)
        with monkeypatch.context() as patch:
            if fails:
                stop_at(patch, Optimizer, "step", 3, torch.OutOfMemoryError("out of memory"))
            train(trainer)
        return [row["reward/mean"] for row in trainer.run.metrics()]

    undisturbed = rewards_of("whole", False)
    assert len(set(undisturbed)) == 4 and rewards_of("run", True) == undisturbed
