"""Training from Python: objects in place of names, the caller's own loop, and nothing left behind."""

import copy
import gc
import logging
import os
import warnings
import weakref

import pytest
import torch
from tiny_runs import MEASURED, learned, save_tiny_chat_model, tiny_values, write_jsonl

import lowmem_rlhf as lm
from lowmem_rlhf.run.directory import RunDirectory


def longer(completions, **columns):
    return [float(len(one)) for one in completions]


def has_answer(prompts, completions, answer, **columns):
    return [float(right in one) for one, right in zip(completions, answer, strict=True)]


def with_keys(values: dict, **sections) -> dict:
    values = copy.deepcopy(values)
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def quiet(recipe, **arguments):
    return lm.train(recipe, progress=None, **arguments)


def same(one: lm.Run, other: lm.Run) -> bool:
    first, second = learned(RunDirectory(one.path)), learned(RunDirectory(other.path))
    adapters = first.pop("adapter"), second.pop("adapter")
    return first == second and all(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())


def for_rows(recipe: dict) -> dict:
    data = {key: value for key, value in recipe["data"].items() if key not in ("train", "train_size")}
    return {**recipe, "data": {**data, "train": "to be given"}}


@pytest.fixture
def over_rows(recipe) -> dict:
    """A recipe for the fixture `rows`."""
    return for_rows(recipe)


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> lm.Run:
    """Return the run of the fixture `recipe` that nothing disturbs."""
    return quiet(tiny_values(tiny_model), output=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def one_step(tiny_model, rows, tmp_path_factory) -> lm.Run:
    """Return the run of one step over the rows of the fixture `rows`, given as a list."""
    arguments = {"data": rows, "rewards": [longer], "overrides": ["training.max_steps=1"]}
    return quiet(for_rows(tiny_values(tiny_model)), output=tmp_path_factory.mktemp("rows") / "run", **arguments)


def test_rows_and_functions_give_what_the_same_file_gives(over_rows, rows, tmp_path, capsys):
    (tmp_path / "rewards.py").write_text(
        "def longer(completions, **columns):\n    return [float(len(one)) for one in completions]\n"
    )
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    wanted = quiet(with_keys(over_rows, rewards=["rewards.py:longer"]), data=file, output="file")
    got = quiet(over_rows, data=rows, rewards=[longer], output="objects")
    assert same(got, wanted)
    assert capsys.readouterr() == ("", "")
    resolved = got.recipe
    assert (resolved.data.train, resolved.rewards[0].function) == ("python:data", "python:longer")
    assert repr(got) == "<Run 'objects', 3 steps>"


def test_gates_that_are_open_change_no_bit_of_a_run(over_rows, rows):
    plain = quiet(over_rows, data=rows, rewards=[longer, (has_answer, 0.3)], output="plain")
    gated = {"function": has_answer, "weight": 0.3, "requires": {"longer": -1}, "normalize": "none"}
    assert same(quiet(over_rows, data=rows, rewards=[longer, gated], output="gated"), plain)


def test_rewards_are_normalised_by_group_where_a_run_learns_and_told_raw(over_rows, rows):
    asked = {"function": longer, "weight": 2.0, "normalize": "group"}
    with lm.Trainer(over_rows, data=rows, rewards=[asked], output="run", progress=None) as trainer:
        step = next(iter(trainer))
    raw = torch.tensor(step.rollout.scored.by_name["longer"]).view(-1, 4)
    wanted = 2 * (raw - raw.mean(1, keepdim=True)) / (raw.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(torch.tensor(step.rollout.scored.total).view(-1, 4), wanted)
    assert wanted.abs().max() > 1
    assert step.metrics["reward/mean"] == pytest.approx(2 * raw.mean().item())
    assert step.metrics["reward/std"] == pytest.approx(2 * raw.std().item())


def test_a_function_gets_texts_of_a_chat_where_it_asks_for_them(over_rows, rows, tmp_path):
    calls = []

    def shorter(texts, completions, **columns):
        calls.append((texts, completions))
        return [-float(len(text)) for text in texts]

    model, once = str(save_tiny_chat_model(tmp_path / "chat")), ["training.max_steps=1"]
    quiet(over_rows, model=model, data=rows, eval_data=rows[:2], rewards=[shorter], overrides=once)
    assert [len(texts) for texts, _ in calls] == [2, 16, 2]  # evaluation, a step, evaluation
    for texts, completions in calls:
        assert completions == [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("kind", ["dataset", "frame", "generator", "splits", "dict recipe's own"])
def test_data_may_have_any_form_that_rows_have(over_rows, rows, kind, one_step):
    import datasets
    import pandas

    forms = {
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "frame": lambda: pandas.DataFrame(rows),
        "generator": lambda: (row for row in rows),
        "splits": lambda: {"train": rows},
        "dict recipe's own": lambda: rows,
    }
    recipe = with_keys(over_rows, rewards=[longer]) if "recipe" in kind else over_rows
    rewards = None if "recipe" in kind else [longer]
    got = quiet(recipe, data=forms[kind](), rewards=rewards, output=kind, overrides={"training.max_steps": 1})
    assert same(got, one_step)


def test_held_out_rows_are_given_or_taken_out_of_the_rows(over_rows, rows):
    said = []

    class Display:
        def phase(self, name, done=0, total=None):
            said.append(f"{name} {done}/{total}")

        def message(self, text):
            said.append(text)

    few = with_keys(over_rows, data={"eval_size": 128})
    run = lm.train(few, data=rows, rewards=[longer], overrides=["training.max_steps=1"], progress=Display(), output="a")
    assert run.evaluation()["before"]["problems"] == 6
    assert "6 of the 24 rows given are held out; data.eval_size (the recipe says 128) sets how many" in said
    assert "steps 1/1" in said and any(one.startswith("rollout ") for one in said)
    run = quiet(
        over_rows, data=rows, eval_data=rows[:2], rewards=[longer], overrides=["training.max_steps=1"], output="b"
    )
    assert run.evaluation()["before"]["problems"] == 2
    with pytest.raises(lm.UserError, match=r"data\.eval: python:eval_data is also data\.train"):
        quiet(over_rows, data=rows, eval_data=rows, rewards=[longer], output="c")


def test_a_display_that_fails_does_not_end_the_run(recipe):
    class Display:
        calls = 0

        def phase(self, name, done=0, total=None):
            self.calls += 1
            raise ValueError("no window")

        def message(self, text):
            pass

    display = Display()
    with pytest.warns(UserWarning, match="the display failed in phase and is told nothing more: no window"):
        run = lm.train(recipe, overrides=["training.max_steps=1"], progress=display, output="run")
    assert len(run.metrics()) == 1 and display.calls == 1


def test_the_loop_is_the_users_and_gives_the_same_run(recipe, whole):
    trainer = lm.Trainer(recipe, output="by_hand", progress=None)
    assert trainer.plan.fits and trainer.step == 0 and trainer.base.packable
    seen = [step.metrics["step"] for step in trainer]
    assert seen == [1, 2, 3]
    assert same(trainer.run, whole)
    with pytest.raises(lm.UserError, match="the trainer of by_hand is closed"):
        next(iter(trainer))


def test_a_loop_that_ends_early_leaves_what_resume_goes_on_from(recipe, whole):
    with lm.Trainer(recipe, output="early", progress=None) as trainer:
        for step in trainer:
            if step.metrics["step"] == 1:
                break
    assert RunDirectory(trainer.path).latest_checkpoint()[0] == 1
    assert same(quiet(recipe, output="early", resume=True), whole)


def test_a_trainer_that_is_closed_within_its_loop_has_saved_and_writes_no_more(recipe, whole):
    trainer = lm.Trainer(recipe, output="early", progress=None)
    steps = iter(trainer)
    next(steps)
    trainer.close()
    assert RunDirectory("early").latest_checkpoint()[0] == 1
    run = quiet(recipe, output="early", resume=True)
    del steps
    gc.collect()
    assert same(run, whole)


def test_a_loop_that_ends_early_on_a_full_disk_says_what_is_lost(recipe, monkeypatch):
    from lowmem_rlhf.training import loop

    def full(*args):
        raise lm.RunError("no room")

    told = Told()
    trainer = lm.Trainer(recipe, output="early", progress=told)
    monkeypatch.setattr(loop, "save_checkpoint", full)
    for _ in trainer:
        break
    trainer.close()
    assert any("step 1 is lost, as they could not be saved (no room)" in text for text in told.messages)


class Told:
    """A display that keeps what it is told."""

    def __init__(self):
        self.messages: list[str] = []

    def phase(self, name, done=0, total=None):
        pass

    def message(self, text):
        self.messages.append(text)

    def plan(self, plan):
        pass

    def begin(self, total_steps, step):
        pass

    def step(self, metrics):
        pass

    def end(self):
        pass

    def evaluation(self, evaluation):
        pass


def test_a_run_of_objects_resumes_only_with_them_given_again(over_rows, rows, lowmem_rlhf):
    arguments = {"data": rows, "rewards": [(has_answer, 2.0), longer]}
    wanted = quiet(over_rows, output="whole", **arguments)
    with lm.Trainer(over_rows, output="early", progress=None, **arguments) as trainer:
        next(iter(trainer))
    with pytest.raises(lm.UserError, match=r"data.train: python:data was given by a Python program") as error:
        quiet("early/recipe.yaml", output="early", resume=True)
    assert error.value.exit_code == 2
    done = lowmem_rlhf("train", "early/recipe.yaml", "--output", "early", "--resume")
    assert (done.code, "was given by a Python program and is not here" in done.err) == (2, True)
    with pytest.raises(lm.UserError, match="the rows of python:data are not those that the run began with"):
        quiet(over_rows, output="early", resume=True, **{**arguments, "data": rows[:-1]})
    assert same(quiet(over_rows, output="early", resume=True, **arguments), wanted)


def test_two_trainings_in_one_process_and_the_first_ones_memory_is_free(recipe, monkeypatch):
    from lowmem_rlhf.engine.base import SharedBase

    bases = []
    load = SharedBase.load.__func__

    def noted(cls, *args, **kwargs):
        gc.collect()
        assert all(base() is None for base in bases), "the base of an earlier run is still there"
        made = load(cls, *args, **kwargs)
        bases.append(weakref.ref(made))
        return made

    monkeypatch.setattr(SharedBase, "load", classmethod(noted))
    first, second = quiet(recipe, output="one"), quiet(recipe, output="two")
    assert same(first, second)
    assert first.generate("1+1=", max_tokens=2) == second.generate("1+1=", max_tokens=2) if first.close() else True
    gc.collect()
    assert len(bases) >= 2 and all(base() is None for base in bases[:2])


def test_a_training_leaves_logging_warnings_and_environment_as_they_were(recipe):
    loggers = [logging.getLogger(name) for name in ("transformers", "datasets", "bitsandbytes", "accelerate")]
    before = [one.level for one in loggers], list(warnings.filters), set(os.environ)
    quiet(recipe, overrides=["training.max_steps=1"])
    assert ([one.level for one in loggers], list(warnings.filters)) == before[:2]
    assert set(os.environ) - before[2] <= {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
        "ACCELERATE_MIXED_PRECISION",
    }
    assert not logging.getLogger("lowmem_rlhf").handlers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_the_one_copy_of_the_base(recipe, tiny_model, dtype, whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted, recipe = whole, with_keys(recipe, hardware={"compute_dtype": dtype})
    if dtype != whole.recipe.hardware.compute_dtype:
        wanted = quiet(recipe, output="named")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = lm.Trainer(recipe, model=model, tokenizer=tokenizer, output="object", progress=None)
    base = {p.untyped_storage().data_ptr() for name, p in trainer.base.model.named_parameters() if "lora_" not in name}
    assert base == storages
    for _ in trainer:
        pass
    assert same(trainer.run, wanted)
    del wanted


MISTAKES = {
    "a recipe that is not there": ({"recipe": "quickstrat"}, "did you mean 'quickstart'"),
    "a recipe of another kind": ({"recipe": 3}, "recipe: got a int; give a shipped name, a path, or a dict"),
    "an override that is no list": (
        {"overrides": "training.max_steps=1"},
        "overrides: got 'training.max_s",
    ),
    "an unknown key": ({"overrides": {"training.max_step": 1}}, "did you mean 'max_steps'"),
    "a value of a wrong kind": ({"overrides": {"training.max_steps": "many"}}, "training.max_steps"),
    "a value that no recipe holds": ({"overrides": {"name": print}}, "which no recipe can hold"),
    "one row": ({"data": {"question": "1+1", "answer": "2"}}, "data: got a dict; give a path"),
    "no rows": ({"data": []}, "data: there is no row in it"),
    "rows that are texts": ({"data": ["1+1"]}, "data: row 1 is a str; a row maps columns to values"),
    "a column that is missing": ({"data": [{"q": "1+1", "answer": "2"}] * 8}, "question"),
    "a reward that is no function": ({"rewards": [int]}, "rewards: int is a class, not a reward function"),
    "a lambda": ({"rewards": [lambda completions, **columns: [1.0]]}, "rewards: a function without a name of its own"),
    "rewards that are no list": ({"rewards": "length"}, "rewards: got 'length'; give a list"),
    "a weight that is no number": ({"rewards": [(longer, "much")]}, "a pair is a function"),
    "a reward of an unknown name": ({"rewards": ["lenght"]}, "rewards: got 'lenght'"),
    "a tokenizer alone": ({"tokenizer": object()}, "tokenizer: is for a model that is loaded already"),
    "a model of another kind": ({"model": torch.nn.Linear(2, 2)}, "model: got a Linear"),
    "a display of another kind": ({"progress": 7}, "progress: got 7"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_left(recipe, mistake, tmp_path):
    arguments, sentence = MISTAKES[mistake]
    given = {"recipe": recipe, "output": "run", "progress": None, **arguments}
    with pytest.raises(lm.UserError) as error:
        lm.train(given.pop("recipe"), **given)
    assert sentence in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_mistakes_are_said_as_on_the_command_line(recipe, lowmem_rlhf, tmp_path):
    import yaml

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    for override in (
        "training.max_step=1",
        "grpo.loss_type=ppo",
        "rewards=[{function: nothing.py:f}]",
        "data.train=gone.csv",
    ):
        with pytest.raises(lm.UserError) as error:
            lm.train("tiny.yaml", overrides=[override], progress=None)
        done = lowmem_rlhf("train", "tiny.yaml", override)
        assert done.code == error.value.exit_code == 2
        assert done.err.removeprefix("error: ").strip() == str(error.value)


def test_a_reward_that_fails_is_a_run_error_with_what_is_kept(recipe):
    calls = []

    def failing(completions, **columns):
        calls.append(1)
        return longer(completions) if len(calls) < 4 else [0 / 0 for _ in completions]

    with pytest.raises(lm.RunError, match="failing") as error:
        quiet(recipe, rewards=[failing], output="run")
    assert error.value.exit_code == 1
    assert any("is kept" in note for note in error.value.__notes__)


assert MEASURED
