"""Damage to every file of a run is noticed: a resume takes the checkpoint before, and nothing opens what differs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import learned, tiny_recipe

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.progress import shown_by
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train

OF_A_CHECKPOINT = [
    "state.json",
    "optimizer.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "base.json",
    "critic/adapter_model.safetensors",
    "critic/adapter_config.json",
    "critic/head.safetensors",
    "critic/base.json",
]
OF_AN_ADAPTER = [name for name in OF_A_CHECKPOINT if name not in ("state.json", "optimizer.safetensors")]
OTHER_ROLE = {"adapter_model.safetensors": "critic/adapter_model.safetensors"}


def flip_bit(file: Path, spare: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def zero_block(file: Path, spare: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 512] = bytes(len(data[len(data) // 3 : len(data) // 3 + 512]))
    file.write_bytes(data)


def cut(file: Path, spare: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def swap(file: Path, spare: Path) -> None:
    """Put the file of another checkpoint in its place, or where that has the same content, of another role."""
    if spare.read_bytes() == file.read_bytes():
        spare = file.with_name("adapter_config.json" if file.name == "base.json" else "base.json")
    shutil.copyfile(spare, file)


def remove(file: Path, spare: Path) -> None:
    file.unlink()


DAMAGES = [flip_bit, zero_block, cut, swap, remove]


class Said(list):
    """A display that keeps what was said."""

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        pass

    def message(self, text: str) -> None:
        self.append(text)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory) -> Path:
    """Return a run of PPO with checkpoints of steps 2 and 4."""
    torch.set_num_threads(1)
    recipe = tiny_recipe(
        tiny_model,
        algorithm="ppo",
        hardware={"gradient_checkpointing": False},
        generation={"num_generations": 2, "max_completion_length": 6},
        training={"max_steps": 4, "prompts_per_step": 2},
    )
    return train(recipe, tmp_path_factory.mktemp("runs") / "made").path


@pytest.fixture
def run(made, tmp_path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(made, tmp_path / "run")))


def resume(run: RunDirectory, **training: int) -> tuple[RunDirectory, Said]:
    """Go on with a run as `train --resume` does, without a model; return it and what was said."""
    recipe = run.recipe()
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 6, **training})})
    with shown_by(said := Said()):
        resumed = RunDirectory.create(run.path, recipe, run.plan(), resume=True)
    resumed.unlock()
    return resumed, said


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_healthy_run_goes_on_from_its_last_checkpoint_and_says_nothing(run):
    resumed, said = resume(run)
    assert said == [] and resumed.latest_checkpoint()[0] == 4 and resumed.last_healthy()[0] == 4
    assert len(resumed.metrics()) == 4


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(run, name, damage):
    newest = run.path / "checkpoints" / "step-4"
    damage(newest / name, run.path / "checkpoints" / "step-2" / name)
    damaged = contents(newest)
    resumed, said = resume(run)
    assert [step for step, _ in resumed.checkpoints()] == [2]
    assert contents(newest.with_name("step-4.damaged")) == damaged
    assert len(said) == 1 and name in said[0] and "step-4.damaged" in said[0]
    assert [row["step"] for row in resumed.metrics()] == [1, 2]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", OF_AN_ADAPTER)
def test_a_damaged_adapter_is_not_opened(run, name, damage, lowmem_rlhf):
    damage(run.path / "adapter" / name, run.path / "checkpoints" / "step-2" / name)
    done = lowmem_rlhf("export", run.path, "--format", "adapter")
    assert done.code == 2 and f"adapter is damaged: {name}" in done.err and "--resume" in done.err


@pytest.mark.parametrize("command", ["eval", "chat", "export"])
def test_every_command_refuses_a_damaged_checkpoint(run, command, lowmem_rlhf):
    flip_bit(run.path / "checkpoints" / "step-2" / "adapter_model.safetensors", run.path)
    more = ["--prompt", "1+2="] if command == "chat" else []
    done = lowmem_rlhf(command, run.path, "--step", 2, *more)
    assert done.code == 2 and "step-2 is damaged: adapter_model.safetensors is not what was written" in done.err


def test_checkpoints_that_change_places_are_noticed(run):
    folder = run.path / "checkpoints"
    (folder / "step-2").rename(folder / "x"), (folder / "step-4").rename(folder / "step-2")
    (folder / "x").rename(folder / "step-4")
    before = contents(run.path)
    with pytest.raises(
        UserError, match=r"no checkpoint .* is whole \(step-4: state.json is of step 2; step-2: .*step 4"
    ):
        resume(run)
    assert contents(run.path).keys() - {".lock"} == before.keys() - {".lock"}
    assert all(contents(run.path)[name] == data for name, data in before.items() if name != ".lock")


def test_files_that_roles_exchange_are_noticed(run):
    newest = run.path / "checkpoints" / "step-4"
    one, other = newest / "adapter_model.safetensors", newest / "critic" / "adapter_model.safetensors"
    data = one.read_bytes()
    one.write_bytes(other.read_bytes()), other.write_bytes(data)
    assert "adapter_model.safetensors is not what was written" in resume(run)[1][0]


def test_a_file_without_a_hash_is_noticed(run):
    shutil.copytree(run.path / "checkpoints" / "step-4" / "critic", run.path / "checkpoints" / "step-4" / "other")
    assert "is not one of the files that were written" in resume(run)[1][0]


DEEP = b"[" * 200_000 + b"]" * 200_000
CONTENTS = {
    "null": b"null",
    "a list": b"[1, 2]",
    "a number": b"4",
    "a huge number": b"9" * 10_000,
    "nothing": b"",
    "an empty object": b"{}",
    "missing keys": b'{"step": 4}',
    "wrong types": b'{"step": 4, "optimizer": [], "counters": 3}',
    "no step": b'{"step": true, "optimizer": {}, "counters": {}}',
    "deep": DEEP,
    "deep in an object": b'{"step": ' + DEEP + b"}",
    "binary": bytes(range(256)),
    "a proof of nothing": b'{"step": 4, "sha256": "' + b"0" * 64 + b'"}',
    "infinity": b'{"step": Infinity, "optimizer": {}, "counters": {}}',
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_whatever_stands_in_state_json(run, content):
    (run.path / "checkpoints" / "step-4" / "state.json").write_bytes(content)
    resumed, said = resume(run)
    assert resumed.latest_checkpoint()[0] == 2 and len(said) == 1 and "state.json" in said[0]


def test_a_huge_state_json_is_not_read(run):
    with (run.path / "checkpoints" / "step-4" / "state.json").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    assert "state.json is far too large" in resume(run)[1][0]


def test_a_newer_format_is_a_sentence_and_nothing_is_set_aside(run):
    from lowmem_rlhf.run.proof import read_sealed, seal

    file = run.path / "checkpoints" / "step-4" / "state.json"
    file.write_text(seal({**read_sealed(file)[0], "format": 9}))
    with pytest.raises(UserError, match=r"newer version of lowmem-rlhf \(format 9, .*update lowmem-rlhf"):
        resume(run)
    assert file.is_file()


@pytest.mark.parametrize("damage", [flip_bit, zero_block, cut])
@pytest.mark.parametrize("name", ["recipe.yaml", "plan.json", "inputs.json"])
def test_a_resume_computes_from_no_file_that_was_changed(run, name, damage, lowmem_rlhf):
    recipe = run.recipe()
    damage(run.path / name, run.path)
    before = contents(run.path)
    with pytest.raises(UserError, match=rf"{name} is not what the run wrote .*hashes.json"):
        RunDirectory.create(run.path, recipe, {}, resume=True)
    assert {**contents(run.path), ".lock": b""} == {**before, ".lock": b""}


def test_an_edit_that_is_meant_is_taken_once_the_hashes_are_gone(run):
    plan = json.loads((run.path / "plan.json").read_text())
    (run.path / "plan.json").write_text(json.dumps({**plan, "note": "mine"}))
    (run.path / "hashes.json").unlink()
    assert resume(run)[0].plan()["note"] == "mine"
    (run.path / "recipe.yaml").write_bytes((run.path / "recipe.yaml").read_bytes().replace(b"\n", b"\r\n"))
    resume(run)  # other line ends are no change


@pytest.mark.parametrize("damage", [flip_bit, zero_block, cut])
def test_damaged_results_are_set_aside(run, damage):
    damage(run.path / "evaluation.json", run.path)
    resumed, said = resume(run)
    assert len(said) == 1 and "evaluation.json.damaged" in said[0]
    assert resumed.evaluation() == {} and (run.path / "evaluation.json.damaged").is_file()


@pytest.mark.parametrize("damage", [flip_bit, zero_block, cut])
def test_damaged_hashes_are_said(run, damage):
    damage(run.path / "hashes.json", run.path)
    _, said = resume(run)
    assert len(said) == 1 and "hashes.json is damaged" in said[0]
    assert resume(run)[1] == []


@pytest.mark.parametrize("damage", [flip_bit, zero_block, cut, remove])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_damaged_log_is_said_and_stops_nothing(run, name, damage):
    damage(run.path / name, run.path)
    _, said = resume(run)
    assert len(said) == 1 and name in said[0]
    assert (run.path / f"{name}.damaged").is_file() == (damage is not remove)


def test_a_log_that_lacks_steps_is_said_in_one_message(run):
    lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_bytes(b"".join(lines[:2]))
    resumed, said = resume(run)
    assert len(said) == 1 and "2 rows of 4 steps" in said[0]
    assert [row["step"] for row in resumed.metrics()] == [1, 2]


def test_fewer_steps_than_are_done_are_refused_and_as_many_are_not(run, lowmem_rlhf):
    before = contents(run.path)
    done = lowmem_rlhf("train", run.path / "recipe.yaml", "training.max_steps=3", "--output", run.path, "--resume")
    assert done.code == 2 and "training.max_steps: got 3" in done.err and "has taken 4 steps" in done.err
    assert contents(run.path) == before
    resume(run, max_steps=4)


def test_the_run_that_goes_on_from_the_checkpoint_before_is_the_same_run(made, run, lowmem_rlhf):
    flip_bit(run.path / "checkpoints" / "step-4" / "optimizer.safetensors", run.path)
    done = lowmem_rlhf("train", run.path / "recipe.yaml", "--output", run.path, "--resume")
    assert done.code == 0, done.err
    assert "step-4.damaged" in done.out + done.err
    one, other = learned(run), learned(RunDirectory(made))
    assert all(one["adapter"][key].equal(other["adapter"][key]) for key in other["adapter"])
    assert {**one, "adapter": 0} == {**other, "adapter": 0}


def test_an_evaluation_that_cannot_be_kept_is_printed(run, lowmem_rlhf):
    (run.path / "evaluations.jsonl").mkdir()
    done = lowmem_rlhf("eval", run.path, "--json")
    assert done.code == 1 and "evaluations.jsonl cannot be written" in done.err
    assert json.loads(done.out)["results"]["policy"]


def test_a_report_and_a_picture_that_cannot_be_written_are_sentences(run, lowmem_rlhf, tmp_path):
    (tmp_path / "a.png").mkdir()
    done = lowmem_rlhf("report", run.path, "--plot", tmp_path / "a.png")
    assert done.code == 2 and "a.png: it is a folder" in done.err  # before any work
    (run.path / "report.html").unlink(), (run.path / "report.html").mkdir()
    done = lowmem_rlhf("report", run.path)
    assert done.code == 1 and "report.html cannot be written" in done.err


def test_a_changed_recipe_is_said_where_a_run_is_opened(run, lowmem_rlhf, caplog):
    text = (run.path / "recipe.yaml").read_text()
    (run.path / "recipe.yaml").write_text(text.replace("name: tiny", "name: other"))
    done = lowmem_rlhf("chat", run.path, "--prompt", "1+2=", "--json")
    assert done.code == 0 and "recipe.yaml is not what the run wrote" in caplog.text


def test_a_second_trainer_waits_for_the_first(made, run, lowmem_rlhf):
    import lowmem_rlhf as lm

    recipe, resumed = str(run.path / "recipe.yaml"), {"output": run.path, "resume": True, "progress": None}
    first = lm.Trainer(recipe, overrides=["training.max_steps=5"], **resumed)
    with pytest.raises(UserError, match="is being written by this process"):
        lm.Trainer(recipe, **resumed)
    done = lowmem_rlhf("train", recipe, "--output", run.path, "--resume")
    assert done.code == 2 and "is being written by" in done.err
    first.close()
    with lm.Trainer(recipe, overrides=["training.max_steps=5"], **resumed) as second:
        assert [step.metrics["step"] for step in second] == [5]
