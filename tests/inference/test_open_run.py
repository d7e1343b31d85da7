"""A run that has been opened is read once, by whatever uses it; and a base is loaded in one place."""

import ast
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import save_tiny_model, tiny_recipe

import lowmem_rlhf
from lowmem_rlhf.architecture import adapters
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.evaluation.evaluate import evaluate_run
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference import open_run
from lowmem_rlhf.inference.chat.talk import ChatOptions
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.inference.opening import conversation
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.run_plan import running_plan
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("opened")
    return train(tiny_recipe(save_tiny_model(folder / "model")), folder / "run")


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """Count what is read of a run."""
    counted: Counter = Counter()

    def count(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **more: counted.update([name]) or original(*given, **more))

    for name in ("recipe", "plan"):
        count(RunDirectory, name)
    count(open_run, "saved_adapter")
    return counted


def test_a_conversation_and_an_evaluation_read_a_run_once(run, reads):
    opened = OpenRun(run)
    with conversation(opened, None, ChatOptions(compare=True, max_tokens=2)) as talk:
        replies = talk.ask("3+4")
        assert [reply.role for reply in replies] == ["reference", "policy"]
    outcome = evaluate_run(opened, ["data.eval_size=2", "generation.max_completion_length=4"])
    assert set(outcome["results"]) == {"reference", "policy"} and outcome["steps"] == 3
    assert reads == {"recipe": 1, "plan": 1, "saved_adapter": 1}


def test_what_is_read_is_what_the_run_was_made_with(run):
    opened = OpenRun(run)
    assert opened.recipe == opened.written == run.recipe()
    planned = running_plan(tiny_recipe(run.recipe().model))
    assert opened.plan.settings == planned.settings and opened.plan.profile == planned.profile
    assert opened.adapter == adapters.saved_adapter(str(run.path), run.recipe().model)
    step, folder = run.latest_checkpoint()
    assert OpenRun(run, step).adapter.folder == OpenRun(run, step).adapter_folder == folder


def test_a_plan_of_an_earlier_version_opens(run, tmp_path):
    copy = Path(shutil.copytree(run.path, tmp_path / "copy"))
    values = json.loads((copy / "plan.json").read_text())
    for key in ("score_batch_tokens", "rollout_weights", "offload_checkpoints", "offload_embeddings"):
        del values["settings"][key]
    (copy / "plan.json").write_text(json.dumps(values))
    outcome = evaluate_run(OpenRun(RunDirectory(copy)), ["data.eval_size=2", "generation.max_completion_length=4"])
    want = evaluate_run(OpenRun(run), ["data.eval_size=2", "generation.max_completion_length=4"])
    assert outcome["results"] == want["results"]


@pytest.mark.parametrize("content", ["{}", '{"settings": {"quantization": "none"}}', None])
def test_a_run_without_its_settings_is_one_sentence(run, tmp_path, content):
    copy = Path(shutil.copytree(run.path, tmp_path / "copy"))
    (copy / "plan.json").unlink()
    if content is not None:
        (copy / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"holds no plan\.json with the run's settings"):
        _ = OpenRun(RunDirectory(copy)).plan


def test_an_embedding_that_left_the_card_stays_on_a_cpu(run, tmp_path):
    card = Device("cuda:0", "A Card", 8 << 30, 8 << 30, (7, 5), bf16=False)
    cpu = Device("cpu", "CPU", 8 << 30, 8 << 30, None, bf16=True)
    plan = OpenRun(run).plan
    planned = replace(plan, device=card, settings=replace(plan.settings, offload_embeddings=True)).to_dict()
    opened = OpenRun(RunDirectory(tmp_path))
    (tmp_path / "plan.json").write_text(json.dumps(planned))
    assert opened.plan_on(card) == opened.plan == Plan.from_dict(planned)
    assert opened.plan_on(cpu).device == cpu and not opened.plan_on(cpu).settings.offload_embeddings


def test_one_function_of_the_package_loads_a_base():
    package = Path(lowmem_rlhf.__file__).parent
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "SharedBase":
                found.append(file.relative_to(package).as_posix())
    assert found == ["inference/base.py"]


def test_experts_that_the_host_has_no_room_for_get_a_sentence(monkeypatch, tmp_path):
    from lowmem_rlhf.hardware import memory
    from lowmem_rlhf.hardware.cpu_device import cpu_device
    from lowmem_rlhf.inference.base import open_base
    from lowmem_rlhf.planning.plan import make_plan

    recipe = tiny_recipe(save_tiny_model(tmp_path))
    plan = make_plan(recipe, cpu_device(), "cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    crowded = replace(plan, memory={**plan.memory, "host": {"experts": 3 * 2**30}})
    with pytest.raises(UserError, match=r"the experts take 3\.0 GiB of host memory and 1\.0 GiB are free"):
        open_base(recipe, crowded)
