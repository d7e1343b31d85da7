"""What happens to callers of the Python API by accident: one sentence, or it works."""

import asyncio
import copy

import datasets
import pandas
import pytest
import torch

import lowmem_rlhf as lm
from lowmem_rlhf.hardware.live_bytes import LiveBytes


def longer(completions, **columns):
    return [float(len(one)) for one in completions]


@pytest.fixture
def values(recipe) -> dict:
    """A recipe of one step for the fixture `rows`."""
    values = copy.deepcopy(recipe)
    values["data"].pop("train_size", None)
    values["training"]["max_steps"] = 1
    return values


def quiet(values, **arguments):
    return lm.train(values, progress=None, **arguments)


async def slow(completions, **columns):
    await asyncio.sleep(0)
    return longer(completions)


def test_an_asynchronous_reward_works_where_a_loop_runs_already(values, rows):
    async def cell():
        return quiet(values, data=rows, rewards=[slow])

    assert asyncio.run(cell()).metrics()[0]["reward/mean"] > 0


def interrupted(completions, **columns):
    raise KeyboardInterrupt


def in_the_second_step(completions, trainer_state, **columns):
    if trainer_state.global_step == 1:
        raise ValueError("no more")
    return longer(completions)


@pytest.mark.parametrize("reward", [interrupted, in_the_second_step])
def test_a_failed_run_is_free_while_a_notebook_keeps_its_error(values, rows, tiny_model, reward, monkeypatch):
    weights = (tiny_model / "model.safetensors").stat().st_size
    before = LiveBytes().current
    with pytest.raises((KeyboardInterrupt, lm.RunError)) as caught:
        quiet(values, data=rows, rewards=[reward], overrides={"training.max_steps": 2})
    assert caught.value.__traceback__ is not None
    assert LiveBytes().current - before < weights / 4


def test_a_trainer_closed_in_its_loop_ends_it(values):
    trainer = lm.Trainer(values, progress=None, overrides={"training.max_steps": 3})
    for _ in trainer:
        trainer.close()
    assert trainer.run.path.is_dir() and len(trainer.run.metrics()) == 1


def test_splits_may_be_paths(values, rows, tmp_path):
    pandas.DataFrame(rows).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    run = quiet(values, data={"train": "rows.jsonl", "eval": rows[:2]}, rewards=[longer])
    assert (run.recipe.data.train, run.recipe.data.eval) == ("rows.jsonl", "python:eval_data")


@pytest.mark.parametrize("form", ["numpy", "pandas", "torch"])
def test_a_data_set_that_shows_arrays_trains_on_its_values(values, rows, form):
    shown = datasets.Dataset.from_list(rows).with_format(form)
    prompts = {sample["prompt"] for sample in quiet(values, data=shown, rewards=[longer]).samples()}
    assert prompts <= {sample + "=" for sample in (row["question"] for row in rows)} | {row["question"] for row in rows}


def test_messages_of_a_parquet_file_read_by_pandas_are_messages(rows, tmp_path):
    from lowmem_rlhf.data.memory import table_of

    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    pandas.DataFrame({"messages": [messages] * 3}).to_parquet(tmp_path / "rows.parquet")
    (row, *_) = table_of(pandas.read_parquet(tmp_path / "rows.parquet"), "data")
    assert dict(row) == {"messages": messages}


def test_numbers_of_numpy_are_numbers(values, rows):
    one = pandas.Series([1]).iloc[0]
    run = quiet(values, data=rows, rewards=[(longer, one)], overrides={"training.max_steps": one})
    assert run.recipe.rewards[0].weight == 1.0


@pytest.mark.parametrize("change", ["a merged adapter", "a norm", "random"])
def test_a_loaded_model_with_other_weights_than_its_files_is_refused(values, tiny_model, change, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    if change == "a merged adapter":
        lora = LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1], init_lora_weights=False)
        model = get_peft_model(model, lora).merge_and_unload()
    elif change == "a norm":
        model.model.norm.weight.data[-1] += 1
    else:
        model = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(lm.UserError, match="of the object is not the one in"):
        quiet(values, model=model)
    assert not (tmp_path / "runs").exists()


def failing():
    yield {"question": "1+1", "answer": "2"}
    raise ValueError("no more")


def data(completions, **columns):
    return longer(completions)


TWICE = pandas.DataFrame([["1+1", "2", "3"]] * 8, columns=["question", "answer", "answer"])
MISTAKES = {
    "a generator that fails": ({"data": failing()}, "data: reading the rows failed: ValueError: no more"),
    "a Series": ({"data": pandas.Series([1, 2])}, "row 1 is a int"),
    "a column twice": ({"data": TWICE}, "two columns 'answer'"),
    "a split misspelt": ({"data": {"train": "a.jsonl", "evla": "b.jsonl"}}, "got the split 'evla'"),
    "a split of None": ({"data": {"train": None}}, "got None as the split 'train'"),
    "a reward called data": ({"rewards": [data]}, "as the rows are; give it another name"),
    "an output that is no folder": ({"output": 3}, "output: got 3; give the folder of the run"),
    "an empty output": ({"output": ""}, "output: got ''; give the folder"),
    "a weight that is none": (
        {"rewards": [(longer, float("nan"))]},
        "it should be a finite number",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(values, rows, mistake, tmp_path):
    arguments, sentence = MISTAKES[mistake]
    with pytest.raises(lm.UserError) as caught:
        quiet(values, **{"data": rows, "rewards": [longer], **arguments})
    assert sentence in str(caught.value) and not (tmp_path / "runs").exists()


def test_a_reward_of_one_number_for_all_is_a_sentence(values, rows):
    with pytest.raises(lm.RunError, match="returned a Tensor; it must return a list of"):
        quiet(values, data=rows, rewards=[average])


def average(completions, **columns):
    return torch.tensor(longer(completions)).mean()


WRONG_CALLS = [
    ({"prompt": None}, "got a NoneType"),
    ({"prompt": {"role": "user", "content": "1"}}, "got a dict"),
    ({"prompt": [{"role": "user", "content": "1"}]}, "got a dict as a prompt"),
    ({"prompt": "1", "n": 1.5}, "got n=1.5"),
    ({"prompt": "1", "max_tokens": "5"}, "max_tokens='5'"),
    ({"prompt": "1", "temperature": float("nan")}, "got temperature=nan"),
    ({"prompt": "1", "temperature": "0.7"}, "got temperature='0.7'"),
    ({"prompt": "1", "seed": None}, "got seed=None"),
]


def test_generate_says_what_it_takes(values):
    run = quiet(values)
    for arguments, sentence in WRONG_CALLS:
        with pytest.raises(lm.UserError) as caught:
            run.generate(**arguments)
        assert sentence in str(caught.value)


def test_a_plan_checks_what_the_command_line_checks(values, rows):
    with pytest.raises(lm.UserError, match="did you mean 'length'"):
        lm.plan({**values, "rewards": [{"function": "lenght"}]})
    with pytest.raises(lm.UserError, match=r"nope\.jsonl"):
        lm.plan(values, data="nope.jsonl")
    assert lm.plan(values, data=rows, rewards=[longer]).fits


@pytest.mark.parametrize(
    ("folder", "progress", "sentence"), [(None, None, "open_run: got a NoneType"), (".", "no", "progress")]
)
def test_open_run_says_what_it_takes(folder, progress, sentence):
    with pytest.raises(lm.UserError, match=sentence):
        lm.open_run(folder, progress=progress)
