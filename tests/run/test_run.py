"""The run directory's rules: who may write where, what survives a kill, what a resume goes back to."""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from lowmem_rlhf import files
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory, default_output, open_run

PLAN = {"fits": True, "settings": {"lora": {"r": 8}}}


def recipe(**training: object) -> Recipe:
    values = {"name": "adder", "model": "tiny", "data": {"train": "arithmetic"}, "rewards": ["exact"]}
    return validate_recipe({**values, "training": {"max_steps": 20, **training}})


def start(path: Path, **training: object) -> RunDirectory:
    run = RunDirectory.create(path, recipe(**training), PLAN, resume=False)
    run.unlock()
    return run


def save(run: RunDirectory, step: int) -> Path:
    with run.new_checkpoint(step) as (folder, _):
        (folder / "adapter.txt").write_text(str(step))
    return run.path / "checkpoints" / f"step-{step}"


def leave_half(run: RunDirectory, step: int) -> None:
    """Leave what a kill within a checkpoint leaves."""
    (run.path / "checkpoints" / f".step-{step}.tmp").mkdir(parents=True)


def go_on(path: Path, recipe: Recipe, plan: dict = PLAN) -> RunDirectory:
    resumed = RunDirectory.create(path, recipe, plan, resume=True)
    resumed.unlock()
    return resumed


def names(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def test_create_writes_recipe_and_plan(tmp_path):
    run = start(tmp_path / "a" / "b")
    assert names(run.path) == {"recipe.yaml", "plan.json", "local.json", "hashes.json", ".lock"}
    assert validate_recipe(run.recipe_values()) == recipe()
    assert run.plan() == PLAN
    assert (run.metrics(), run.samples(), run.evaluation(), run.latest_checkpoint()) == ([], [], {}, None)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / ".DS_Store").touch()
    (tmp_path / ".recipe.yaml.tmp").touch()  # left by a kill before anything was there
    start(tmp_path)
    assert names(tmp_path) == {".DS_Store", "recipe.yaml", "plan.json", "local.json", "hashes.json", ".lock"}


@pytest.mark.parametrize("left", ["recipe.yaml", "metrics.jsonl", "checkpoints"])
def test_another_run_is_never_overwritten(tmp_path, left):
    (tmp_path / left).mkdir() if left == "checkpoints" else (tmp_path / left).write_text("x")
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--output"):
        start(tmp_path)
    assert names(tmp_path) == {left}


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds no run \(thesis.tex\).*--output"):
        start(tmp_path)
    assert names(tmp_path) == {"thesis.tex"}


def test_output_is_a_file_or_below_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        start(tmp_path / "file")
    with pytest.raises(UserError, match="--output"):
        start(tmp_path / "file" / "run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        start(tmp_path / "run")


def test_full_disk_is_a_user_error(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        start(tmp_path / "run")
    assert names(tmp_path / "run") == set()


def test_resume_without_a_run_is_refused_and_without_a_checkpoint_starts_over(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        go_on(tmp_path / "none", recipe())
    assert not (tmp_path / "none").exists()
    run = start(tmp_path / "run")
    run.log_metrics({"step": 1})
    run.write_evaluation({"before": {"accuracy": 0.1}})
    leave_half(run, 5)
    resumed = go_on(run.path, recipe())
    assert resumed.metrics() == [] and resumed.latest_checkpoint() is None
    assert resumed.evaluation() == {"before": {"accuracy": 0.1}}


def test_resume_names_every_difference(tmp_path):
    run = start(tmp_path / "run")
    save(run, 5)
    other = recipe(learning_rate=1e-3, seed=3, max_steps=40)
    other.rewards[0].weight = 2.0
    with pytest.raises(UserError) as caught:
        go_on(run.path, other, PLAN)
    text = str(caught.value)
    assert "training.learning_rate: was 1e-05, is now 0.001" in text
    assert "training.seed" in text and "rewards[0].weight: was 1.0, is now 2.0" in text
    assert "training.max_steps: was" not in text
    assert validate_recipe(run.recipe_values()) == recipe()


def test_resume_may_change_length_logs_and_hardware(tmp_path):
    run = start(tmp_path / "run")
    save(run, 5)
    longer = recipe(max_steps=40, save_steps=7, save_total_limit=9, log_completions=0, report_to=["wandb"])
    longer.hardware.micro_batch_tokens = 64
    resumed = go_on(run.path, longer, {"fits": False})
    assert validate_recipe(resumed.recipe_values()) == longer
    assert resumed.plan() == {"fits": False}
    assert resumed.save_total_limit == 9


def test_resume_leaves_the_logs_as_if_never_interrupted(tmp_path):
    run = start(tmp_path / "run")
    for step in range(1, 8):
        run.log_metrics({"step": step, "loss": step / 3})
        run.log_samples(step, [{"prompt": "p", "completion": f"{step}\u2028é\n"}] * 2)
        if step == 5:
            save(run, 5)
            whole = [(run.path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run.path / name).open("ab") as file:
            file.write(b'{"step": 1')  # torn by a kill
    leave_half(run, 10)
    assert [row["step"] for row in run.metrics()] == list(range(1, 8))
    assert len(run.samples()) == 14

    resumed = go_on(run.path, recipe())
    assert [(run.path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")] == whole
    assert resumed.latest_checkpoint() == (5, run.path / "checkpoints" / "step-5")
    assert names(run.path / "checkpoints") == {"step-5"}
    resumed.log_metrics({"step": 6})
    assert [row["step"] for row in resumed.metrics()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("tail", [b'{"step": 3', b'{"step": 3}', b"\x00\x00\x00", b"\xff\xfe\n"])
def test_a_torn_last_line_is_ignored(tmp_path, tail):
    run = start(tmp_path / "run")
    run.log_metrics({"step": 1})
    run.log_metrics({"step": 2})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert [row["step"] for row in run.metrics()] == [1, 2]
    run.rewind(9)
    assert (run.path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    run = start(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is not JSON"):
        run.metrics()


def test_resume_drops_a_stale_after(tmp_path):
    run = start(tmp_path / "run")
    save(run, 20)
    run.write_evaluation({"before": {"accuracy": 0.1}, "after": {"accuracy": 0.5}})
    go_on(run.path, recipe())
    assert "after" in run.evaluation()  # the run was complete
    go_on(run.path, recipe(max_steps=30), PLAN)
    assert run.evaluation() == {"before": {"accuracy": 0.1}}


def test_checkpoints_appear_whole_and_the_oldest_go(tmp_path):
    run = start(tmp_path / "run", save_total_limit=2)
    with run.new_checkpoint(2) as (folder, _):
        (folder / "sub").mkdir()
        (folder / "sub" / "x.bin").write_bytes(b"1")
        assert run.latest_checkpoint() is None
    assert (run.path / "checkpoints" / "step-2" / "sub" / "x.bin").read_bytes() == b"1"
    for step in (4, 10, 100):
        save(run, step)
    assert names(run.path / "checkpoints") == {"step-10", "step-100"}  # by number, not by name
    assert run.latest_checkpoint() == (100, run.path / "checkpoints" / "step-100")


def test_a_checkpoint_that_fails_leaves_nothing_and_can_be_saved_again(tmp_path):
    run = start(tmp_path / "run")
    for number, error in enumerate((OSError(28, "No space left on device"), ZeroDivisionError(), None)):
        with pytest.raises((RunError, ZeroDivisionError)) if error else nullcontext():
            with run.new_checkpoint(3) as (folder, _):
                assert names(folder) == set()
                (folder / str(number)).touch()
                if error:
                    raise error
            assert names(run.path / "checkpoints") == ({"step-3"} if number == 2 else set())
    assert names(run.path / "checkpoints" / "step-3") == {"2", "state.json"}


def test_rewind_drops_later_checkpoints(tmp_path):
    run = start(tmp_path / "run")
    save(run, 5), save(run, 10)
    run.rewind(5)
    assert run.latest_checkpoint() == (5, run.path / "checkpoints" / "step-5")


def test_foreign_names_are_no_checkpoints(tmp_path):
    run = start(tmp_path / "run")
    for name in ("step-7.bak", "step-x", ".step-9.tmp", ".step-8.old.tmp"):
        (run.path / "checkpoints" / name).mkdir(parents=True)
    (run.path / "checkpoints" / "step-11").touch()
    assert run.latest_checkpoint() is None


def test_adapter_appears_only_when_written(tmp_path):
    run = start(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.new_adapter() as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not (run.path / "adapter").exists()
    for text in ("1", "2"):
        with run.new_adapter() as folder:
            (folder / "adapter.json").write_text(text)
    assert (run.path / "adapter" / "adapter.json").read_text() == "2"
    assert names(run.path / "adapter") == {"adapter.json", "hashes.json"}


def test_json_has_no_nan(tmp_path):
    run = start(tmp_path / "run")

    class Scalar:
        def item(self) -> float:
            return float("inf")

    run.log_metrics({"step": 1, "kl": float("nan"), "x": Scalar(), "y": [1.5, (float("-inf"), True, None, "é")]})
    run.write_evaluation({"before": {"accuracy": float("nan")}})
    text = (run.path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 1, "kl": None, "x": None, "y": [1.5, [None, True, None, "é"]]}
    assert "NaN" not in text and "Infinity" not in text
    assert run.evaluation() == {"before": {"accuracy": None}}


def test_half_a_character_can_be_logged(tmp_path):
    run = start(tmp_path / "run")
    run.log_samples(1, [{"prompt": "p", "completion": "\ud83d"}])
    assert run.samples() == [{"step": 1, "prompt": "p", "completion": "\ud83d"}]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "plan.json"
    files.atomic_write(target, "old")

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(files, "_replace", fail)
    with pytest.raises(OSError, match="disk"):
        files.atomic_write(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == {"plan.json"}


def test_open_run(tmp_path):
    run = start(tmp_path / "run")
    assert open_run(run.path).plan() == PLAN
    assert open_run(str(run.path)).save_total_limit is None
    with pytest.raises(UserError, match="does not exist"):
        open_run(tmp_path / "nothing")
    with run.new_adapter() as folder:
        (folder / "x").touch()
    with pytest.raises(UserError, match=r"holds no recipe.yaml.*did you mean .*run\?"):
        open_run(run.path / "adapter")


def test_broken_files_are_user_errors(tmp_path):
    run = start(tmp_path / "run")
    (run.path / "plan.json").write_text("{")
    (run.path / "evaluation.json").write_text("[]")
    (run.path / "recipe.yaml").write_text("a: [")
    for read, match in (
        (run.plan, "not JSON"),
        (run.evaluation, "no.* JSON object"),
        (run.recipe_values, "recipe.yaml"),
    ):
        with pytest.raises(UserError, match=match):
            read()


def test_default_output_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_output("adder") == default_output("adder", resume=True) == Path("runs/adder")
    start(Path("runs/adder"))
    assert default_output("adder") == Path("runs/adder-2")
    start(Path("runs/adder-2"))
    assert default_output("adder") == Path("runs/adder-3")
    assert default_output("adder", resume=True) == Path("runs/adder-2")
    assert default_output("../a b:c") == Path("runs/a-b-c")
    assert default_output("") == Path("runs/run")
    Path("runs/empty").mkdir()
    assert default_output("empty") == Path("runs/empty")
