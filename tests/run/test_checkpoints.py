"""What pruning keeps, what reaches the disk first, and what a kill within a write leaves."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
from test_run import PLAN, go_on, names, recipe, save, start

from lowmem_rlhf import files
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import delete
from lowmem_rlhf.run.directory import RunDirectory


def save_as(run: RunDirectory, step: int, healthy: bool) -> None:
    with run.new_checkpoint(step, healthy) as (folder, _):
        (folder / "x.json").write_text("1")


def test_a_checkpoint_of_the_steps_in_which_training_went_wrong_is_not_the_healthy_one(tmp_path):
    run = start(tmp_path / "run", save_total_limit=2)
    for step in (1, 2, 3, 4):  # what went wrong in step 3 was seen in step 4
        run.unhealthy_from = 3 if step == 4 else None
        save_as(run, step, step < 4)
    assert names(run.path / "checkpoints") == {"step-2", "step-3", "step-4"}
    assert run.last_healthy(3)[0] == 2 and run.last_healthy()[0] == 3


def test_the_last_healthy_checkpoint_is_never_pruned(tmp_path):
    run = start(tmp_path / "run", save_total_limit=2)
    for step in (1, 2):
        save_as(run, step, True)
    for step in (3, 4, 5, 6):
        save_as(run, step, False)
        assert run.last_healthy() == (2, run.path / "checkpoints" / "step-2")
    assert names(run.path / "checkpoints") == {"step-2", "step-5", "step-6"}
    save_as(run, 7, True)
    assert names(run.path / "checkpoints") == {"step-6", "step-7"}
    assert run.last_healthy()[0] == 7


def test_no_healthy_checkpoint_is_none(tmp_path):
    run = start(tmp_path / "run")
    assert run.last_healthy() is None
    save_as(run, 1, False)
    assert run.last_healthy() is None


def test_a_resume_prunes_what_a_kill_has_left(tmp_path):
    run = start(tmp_path / "run", save_total_limit=2)
    for step in (1, 2, 3):
        save(RunDirectory(run.path), step)  # without a limit: as if killed before each pruning
    assert names(go_on(run.path, recipe(save_total_limit=2)).path / "checkpoints") == {"step-2", "step-3"}


def test_the_logs_and_all_files_are_synced_before_a_checkpoint_appears_and_its_folder_after(tmp_path, monkeypatch):
    run = start(tmp_path / "run")
    run.log_metrics({"step": 1}), run.log_samples(1, [{"prompt": "p"}])
    order: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        order.append(f"-> {Path(target).name}")
        real_replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("only Linux names the files of descriptors")
    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.os, "replace", replace)
    save(run, 1)
    appeared = order.index("-> step-1")
    assert {"metrics.jsonl", "samples.jsonl", "state.json", "adapter.txt", ".step-1.tmp"} <= set(order[:appeared])
    assert order[appeared + 1] == "checkpoints"


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_kill_at_any_write_of_the_text_files_leaves_a_run_that_goes_on(tmp_path, monkeypatch, stop):
    """Each file is renamed into its place: a kill at the n-th of these, before it or behind it."""
    real, calls = files._replace, iter(range(1, 100))

    class Killed(BaseException):
        pass

    def replace(source: Path, target: Path) -> None:
        if next(calls) == stop:
            raise Killed
        real(source, target)

    run = start(tmp_path / "run")
    run.write_evaluation({"before": {"accuracy": 0.1}})
    save(run, 5)
    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(files, "_replace", replace)
        go_on(run.path, recipe(max_steps=30), {"settings": {}, "fits": False})
    resumed = go_on(run.path, recipe(max_steps=40))
    assert resumed.evaluation() == {"before": {"accuracy": 0.1}} and resumed.plan() == PLAN


def test_a_kill_while_a_new_run_begins_leaves_one_that_can_begin_or_go_on(tmp_path, monkeypatch):
    real = files._replace

    class Killed(BaseException):
        pass

    for stop in range(1, 8):
        calls = iter(range(1, 100))

        def replace(source: Path, target: Path, calls=calls, stop=stop) -> None:
            if next(calls) == stop:
                raise Killed
            real(source, target)

        path = tmp_path / str(stop)
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(files, "_replace", replace)
            start(path)
        if (path / "recipe.yaml").exists():
            assert go_on(path, recipe()).plan() == PLAN
        else:
            assert start(path).plan() == PLAN


def test_all_checkpoints_damaged_is_refused_with_nothing_changed(tmp_path):
    run = start(tmp_path / "run")
    for step in (1, 2):
        (save(run, step) / "adapter.txt").write_text("other")
    with pytest.raises(UserError, match=r"no checkpoint of the run in .* is whole \(step-2: adapter.txt .*; step-1:"):
        go_on(run.path, recipe())
    assert names(run.path / "checkpoints") == {"step-1", "step-2"}


def test_a_second_damage_of_one_step_gets_another_name(tmp_path):
    run = start(tmp_path / "run")
    save(run, 1)
    for _ in range(2):
        (save(run, 2) / "adapter.txt").write_text("other")
        go_on(run.path, recipe())
    assert names(run.path / "checkpoints") == {"step-1", "step-2.damaged", "step-2.damaged-2"}
    delete(run.path / "checkpoints" / "step-1")
    assert go_on(run.path, recipe()).latest_checkpoint() is None  # what was set aside is no checkpoint
