"""An algorithm from outside the package, registered or named as path.py:SPEC, is one as any other."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from lowmem_rlhf import cli
from lowmem_rlhf.algorithms import registry
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe import schema
from lowmem_rlhf.recipe.loading import load_recipe, validate_recipe
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))
from tiny_runs import learned, save_tiny_model, tiny_values

FILE = Path(__file__).resolve().parent / "toy_algorithm" / "raft.py"


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """Let an algorithm be known for one test alone."""
    for name in ("_specs", "_written"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    added = set(schema._added)
    yield
    for key in schema._added - added:
        del schema.Recipe.model_fields[key]
    schema._added &= added
    schema.Recipe.model_rebuild(force=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder with the user's file in it, to work in."""
    (tmp_path / "raft.py").write_bytes(FILE.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(model: Path, **changes) -> dict:
    """Return the tiny recipe for RAFT, two steps of it; GRPO's section is not its own."""
    values = {**tiny_values(model), "algorithm": "raft.py:RAFT", "raft": {"margin": 0.01}, **changes}
    del values["grpo"]
    values["training"] = {**values["training"], "max_steps": 2, "save_steps": 1}
    return values


@pytest.fixture
def command(here, model, monkeypatch, capsys):
    """Return a function that runs a command of the program on RAFT's recipe and returns its code and texts."""
    (here / "raft.yaml").write_text(yaml.safe_dump(written(model)))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowmem-rlhf", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_registered_algorithm_has_its_name_its_title_and_its_section(here, model):
    spec = registry.load_own("raft.py:RAFT")
    assert registry.spec_of("raft") is spec and "raft" in registry.names()
    for name in ("raft", "RAFT", "Raft"):
        recipe = validate_recipe(written(model, algorithm=name))
        assert recipe.spec is spec and recipe.algorithm == "raft"
        assert recipe.spec.own(recipe).margin == 0.01
    again = yaml.safe_load(recipe.to_yaml())
    assert again["algorithm"] == "raft" and again["raft"] == {"margin": 0.01}
    assert validate_recipe(again) == recipe


def test_other_recipes_do_not_tell_of_it(here):
    before = load_recipe("quickstart").to_yaml()
    registry.load_own("raft.py:RAFT")
    assert load_recipe("quickstart").to_yaml() == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("raft.margn=1", "raft.margn: unknown key; did you mean 'margin'?"),
        ("margin=1", "margin: unknown key; did you mean 'data.margin' or 'raft.margin'?"),
        ("raft.margin=-1", "raft.margin: got -1; it should be at least 0"),
        ("rewards=[]", "rewards: missing; raft.py:RAFT needs at least one"),
        ("generation.num_generations=1", "generation.num_generations: got 1; RAFT compares the completions"),
        ("training.num_train_epochs=1", "training.num_train_epochs: is for sft"),
    ],
)
def test_its_recipe_is_checked_as_any(command, override, message):
    code, _, err = command("plan", "raft.yaml", override)
    assert code == 2 and message in err and "Traceback" not in err


def test_its_settings_are_overridden_and_an_algorithm_is_chosen_on_the_command_line(command):
    assert load_recipe("quickstart", ["raft.margin=0.3", "algorithm=raft.py:RAFT"]).raft.margin == 0.3
    assert load_recipe("raft.yaml", ["raft.margin=0.3"]).raft.margin == 0.3
    assert load_recipe("raft.yaml", ["algorithm=grpo"]).spec.name == "grpo"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rft.py:RAFT", "algorithm: there is no file rft.py; give its path from the current folder"),
        ("raft.py:RAF", "algorithm: raft.py defines no 'RAF'; did you mean 'RAFT'? (it has: RAFT)"),
        ("raft.py:NO_SPEC", "algorithm: raft.py:NO_SPEC is a ModelMetaclass, not an AlgorithmSpec"),
        ("raft.py", "algorithm: got 'raft.py'; an algorithm of your own is written path.py:SPEC"),
        ("broken.py:SPEC", "algorithm: broken.py, line 1, cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_gives_no_algorithm_is_one_sentence(command, here, name, message):
    (here / "broken.py").write_text("SPEC = 1 / 0\n")
    code, _, err = command("plan", "raft.yaml", f"algorithm={name}")
    assert (code, err) == (2, f"error: {message}\n")


def test_a_name_or_a_section_that_is_taken_is_refused(here):
    spec = registry.load_own("raft.py:RAFT")
    from dataclasses import replace

    for changes, part in (
        ({"name": "ppo"}, "'ppo' is one of this package's own"),
        ({"section": "training"}, "'training' is a key of every recipe"),
        ({"section": "other", "settings": None}, "no settings for its section 'other'"),
    ):
        with pytest.raises(UserError, match=part):
            registry.register_algorithm(replace(spec, **changes))


def test_it_is_planned_as_what_its_facts_say(here, model):
    recipe = validate_recipe(written(model))
    plan = plan_recipe(recipe)
    assert plan.fits and set(plan.memory["phases"]) == {"rollout", "scoring", "update", "optimizer", "export"}
    grpo = plan_recipe(recipe.model_copy(update={"algorithm": "grpo"}))
    assert plan.memory["phases"]["update"] == grpo.memory["phases"]["update"]


def test_it_trains_resumes_and_exports(command, here):
    code, out, _ = command("plan", "raft.yaml", "--json")
    assert code == 0 and json.loads(out)["fits"]
    assert command("train", "raft.yaml", "--output", "whole")[0] == 0
    whole = RunDirectory(here / "whole")
    assert whole.recipe_values()["algorithm"] == "raft.py:RAFT" and whole.recipe_values()["raft"] == {"margin": 0.01}
    rows = whole.metrics()
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)

    assert command("train", "raft.yaml", "--output", "parts", "training.max_steps=1")[0] == 0
    code, out, err = command("train", "raft.yaml", "--output", "parts", "--resume")
    assert code == 0, err
    assert "going on after step 1" in out
    (one, two) = learned(whole), learned(RunDirectory(here / "parts"))
    assert one["metrics"] == two["metrics"]
    assert all((one["adapter"][key] == two["adapter"][key]).all() for key in one["adapter"])

    code, _, err = command("export", "whole", "--format", "adapter")
    assert code == 0, err
    assert (whole.path / "export" / "adapter" / "adapter_model.safetensors").is_file()


def test_its_run_is_opened_from_another_folder(command, here, model, monkeypatch):
    run = train(load_recipe("raft.yaml"), Path("run"))
    place = run.path.resolve()
    other = here / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    registry._written.clear()  # as a new process
    assert RunDirectory(place).recipe().spec.name == "raft"
    registry._written.clear()
    assert load_recipe(str(place / "recipe.yaml"), quiet=True).algorithm == "raft.py:RAFT"


def test_an_error_of_an_algorithm_is_one_sentence_with_its_line(here, command):
    text = (
        (here / "raft.py")
        .read_text()
        .replace("totals, base = rollout.scored.total, ", "totals, base = rollout.score, ")
    )
    (here / "raft.py").write_text(text)
    line = 1 + text[: text.index("rollout.score, ")].count("\n")
    code, _, err = command("train", "raft.yaml")
    assert code == 1
    sentence = (
        f"error: algorithm raft.py:RAFT failed in raft.py, line {line}: AttributeError: 'Rollout' object has no attri"
    )
    assert err.splitlines()[-1].startswith(sentence) and "Traceback" not in err
