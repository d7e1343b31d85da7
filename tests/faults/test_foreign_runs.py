"""A run from elsewhere is data: the code that it names is not executed unless its user says so."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_runs import tiny_values

import lowmem_rlhf as lm
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.directory import RECIPE, open_run
from lowmem_rlhf.run.start import LOCAL, run_id
from lowmem_rlhf.run.trust import check_code, code_of, state_folder

REWARD = """
from pathlib import Path

import scale

Path(__file__).with_name("executed").touch()


def length(completion_ids, **columns):
    return [len(ids) / scale.MOST for ids in completion_ids]
"""
SPEC = """
from dataclasses import replace
from pathlib import Path

from lowmem_rlhf.algorithms.grpo.spec import SPEC as GRPO

Path(__file__).with_name("executed").touch()
SPEC = replace(GRPO, name="mine")
"""


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """Return a folder with reward.py and the run that was trained with it, in which it was started."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "reward.py").write_text(REWARD)
    (folder / "scale.py").write_text("MOST = 12\n")
    values = tiny_values(tiny_model)
    values["rewards"] = [{"function": "reward.py:length"}]
    values["training"] |= {"max_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lm.train(values, output="run")
    return folder


@pytest.fixture
def own(trained, tmp_path, monkeypatch) -> Path:
    """Return a copy of the folder, in which the current process is; nothing in it was executed yet."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    (folder / "executed").unlink(missing_ok=True)
    local = json.loads((folder / "run" / LOCAL).read_text())
    (folder / "run" / LOCAL).write_text(json.dumps({**local, "start": str(folder)}))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stranger(own, tmp_path, monkeypatch) -> Path:
    """Return the copy for a user who has trained nothing on this machine."""
    monkeypatch.setenv("LOWMEM_RLHF_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("lowmem_rlhf.run.trust._noted", {})
    return own


def executed(folder: Path) -> bool:
    return (folder / "executed").exists()


def asks(done, folder: Path, *parts: str) -> None:
    assert done.code == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert all(part in done.err for part in ("--trust-run", *parts)), done.err
    assert not executed(folder)


def test_one_s_own_run_never_asks(own, lowmem_rlhf):
    done = lowmem_rlhf("eval", "run", "data.eval_size=2")
    assert done.code == 0, done.err
    assert executed(own)


def test_eval_of_a_foreign_run_asks_and_names_the_file(stranger, lowmem_rlhf):
    asks(lowmem_rlhf("eval", "run"), stranger, str(stranger / "reward.py"), "rewards[0].function", "not trained by you")


@pytest.mark.parametrize("spelled", ["dot.py:f\u00b7g", " reward.py:good", "reward.py:good "])
def test_code_is_found_however_it_is_spelled(stranger, lowmem_rlhf, spelled):
    for name in ("dot.py", " reward.py", "reward.py "):
        shutil.copy(stranger / "reward.py", stranger / name)
    file = stranger / "run" / RECIPE
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, "rewards": [{**values["rewards"][0], "function": spelled}]}))
    done = lowmem_rlhf("eval", "run")
    assert done.code == 2 and not executed(stranger), done
    assert "--trust-run" in done.err


@pytest.mark.parametrize("value", [1, "true", "yes", "on"])
def test_trust_remote_code_is_found_however_it_is_spelled(stranger, lowmem_rlhf, value):
    file = stranger / "run" / RECIPE
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "trust_remote_code": value}))
    done = lowmem_rlhf("chat", "run", "--prompt", "1+1")
    assert done.code == 2 and "--trust-run" in done.err, done


def test_what_is_trusted_is_asked_for_once(stranger, lowmem_rlhf):
    assert lowmem_rlhf("eval", "run", "data.eval_size=2", "--trust-run").code == 0
    assert executed(stranger)
    assert lowmem_rlhf("eval", "run", "data.eval_size=2").code == 0


def test_rewards_of_the_command_line_are_the_user_s_own(stranger, lowmem_rlhf):
    done = lowmem_rlhf("eval", "run", "data.eval_size=2", "rewards=[{function: length, options: {target: 5}}]")
    assert done.code == 0, done.err
    assert not executed(stranger)


@pytest.mark.parametrize("file", ["reward.py", "scale.py"])
def test_a_file_that_has_changed_since_is_asked_for(own, lowmem_rlhf, file):
    (own / file).write_text((own / file).read_text() + "\nOTHER = 1\n")
    done = lowmem_rlhf("eval", "run")
    asks(done, own, str(own / "reward.py"))


def test_the_sentence_says_that_it_changed(trained, monkeypatch, tmp_path):
    file = trained / "reward.py"
    monkeypatch.chdir(trained)
    try:
        file.write_text(REWARD + "# changed\n")
        with pytest.raises(UserError, match="has changed since the run in run was trained"):
            check_code(Path("run"), open_run("run").recipe_values())
        check_code(Path("run"), open_run("run").recipe_values(), resumed=True)  # its owner trains it on
    finally:
        file.write_text(REWARD)


def test_a_copied_id_allows_no_other_file(own, tmp_path, monkeypatch, lowmem_rlhf):
    other = tmp_path / "other"
    shutil.copytree(own, other)
    (other / "reward.py").write_text(REWARD + "import os\n")
    local = json.loads((other / "run" / LOCAL).read_text())
    (other / "run" / LOCAL).write_text(json.dumps({**local, "start": str(other)}))
    assert run_id(other / "run") == run_id(own / "run")
    asks(lowmem_rlhf("eval", other / "run"), other, str(other / "reward.py"))
    with pytest.raises(UserError, match="would be executed"):  # of a resume too: the file lies in another place
        check_code(other / "run", open_run(other / "run").recipe_values(), resumed=True)


def test_an_id_that_is_no_id_leads_to_no_file_of_the_state_folder(own):
    local = json.loads((own / "run" / LOCAL).read_text())
    (own / "run" / LOCAL).write_text(json.dumps({**local, "id": "../" * 8 + "tmp/x"}))
    assert run_id(own / "run") is None
    with pytest.raises(UserError, match="would be executed"):
        check_code(own / "run", open_run("run").recipe_values())


def test_a_resume_of_a_foreign_run_asks(stranger, lowmem_rlhf):
    command = ("train", "run/recipe.yaml", "--output", "run", "--resume", "training.max_steps=2")
    asks(lowmem_rlhf(*command), stranger, str(stranger / "reward.py"))
    done = lowmem_rlhf(*command, "--trust-run")
    assert done.code == 0, done.err
    assert executed(stranger)


def test_trust_without_a_run_is_refused(own, lowmem_rlhf):
    done = lowmem_rlhf("train", "run/recipe.yaml", "--trust-run")
    assert done.code == 2 and "--trust-run: is for a run that goes on" in done.err


@pytest.mark.parametrize(
    "command", [["chat", "run", "--prompt", "1+1"], ["export", "run", "--dry-run"], ["eval", "run"]]
)
def test_a_foreign_algorithm_and_a_model_s_own_code_are_asked_for(stranger, lowmem_rlhf, command):
    values = yaml.safe_load((stranger / "run" / RECIPE).read_text())
    (stranger / "spec.py").write_text(SPEC)
    file = stranger / "run" / RECIPE
    file.write_text(yaml.safe_dump({**values, "algorithm": "spec.py:SPEC"}))
    asks(lowmem_rlhf(*command), stranger, str(stranger / "spec.py"), "(algorithm)")
    file.write_text(yaml.safe_dump({**values, "model": "owner/name", "trust_remote_code": True}))
    asks(lowmem_rlhf(*command), stranger, "owner/name (trust_remote_code)")
    file.write_text(yaml.safe_dump({**values, "trust_remote_code": True}))
    asks(lowmem_rlhf(*command), stranger, f"{Path(values['model']).name} (trust_remote_code)")


def test_chat_and_the_report_execute_no_rewards_and_do_not_ask(stranger, lowmem_rlhf):
    assert lowmem_rlhf("chat", "run", "--prompt", "1+1").code == 0
    assert lowmem_rlhf("report", "run").code == 0
    assert not executed(stranger)


def test_a_recipe_beside_a_foreign_model_is_asked_for(stranger, tiny_model, tmp_path, lowmem_rlhf):
    shutil.copytree(tiny_model, stranger / "model")
    shutil.copy(stranger / "run" / RECIPE, stranger / "model" / RECIPE)
    asks(lowmem_rlhf("eval", "model"), stranger, str(stranger / "reward.py"))
    assert lowmem_rlhf("eval", "model", "data.eval_size=2", "--trust-run").code == 0


def test_open_run_of_python_asks_too(stranger):
    with pytest.raises(UserError, match=r"lm\.open_run\(PATH, trust=True\)"):
        lm.open_run("run").evaluate(["data.eval_size=2"])
    assert not executed(stranger)
    lm.open_run("run", trust=True).evaluate(["data.eval_size=2"])
    assert executed(stranger)


def test_a_state_folder_that_cannot_be_written_is_one_note(stranger, tmp_path, lowmem_rlhf):
    (tmp_path / "state").write_text("a file")
    done = lowmem_rlhf("train", "run/recipe.yaml", "--output", "again")
    assert done.code == 0, done.err
    assert (done.out + done.err).count("could not be noted") == 1
    assert "LOWMEM_RLHF_STATE names another folder" in done.out + done.err
    assert lowmem_rlhf("eval", "again", "data.eval_size=2").code == 0  # this process knows it


def test_the_state_folder_is_the_platform_s(monkeypatch, tmp_path):
    monkeypatch.delenv("LOWMEM_RLHF_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert os.name == "nt" or state_folder() == tmp_path / "lowmem_rlhf"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.name == "nt" or state_folder() == tmp_path / ".local" / "state" / "lowmem_rlhf"


def test_texts_that_look_like_files_are_no_code(tmp_path):
    (tmp_path / "a.py").touch()
    source = f"{tmp_path / 'a.py'}:x"
    assert code_of(tmp_path, {"description": source, "data": {"system": source, "template": source}}) == []
    assert [one.key for one in code_of(tmp_path, {"grpo": {"loss_type": source}})] == ["grpo.loss_type"]
