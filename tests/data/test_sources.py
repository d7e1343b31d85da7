import json
from pathlib import Path

import pytest

from lowmem_rlhf.data.sources import load_rows
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe import DataConfig

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20)]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(path, rows=None):
    rows = ROWS if rows is None else rows
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        import pandas

        frame = pandas.DataFrame(rows)
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return str(path)


def rows_of(split="train", seed=0, **data):
    return load_rows(DataConfig(**data), split, seed)


def refused(message, split="train", **data):
    with pytest.raises(UserError, match=message) as caught:
        rows_of(split, **data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format(tmp_path, ending):
    rows = rows_of(train=write(tmp_path / f"rows.{ending}"), eval_size=0)
    assert [(row["question"], str(row["answer"])) for row in rows] == [(row["question"], row["answer"]) for row in ROWS]


def test_messages_survive_the_file(tmp_path):
    messages = [
        [{"role": "user", "content": "a"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}],
    ]
    path = write(tmp_path / "chat.jsonl", [{"prompt": one} for one in messages])
    rows = rows_of(train=path, prompt="prompt", answer=None, eval_size=0)
    assert [row["prompt"] for row in rows] == messages


def test_held_out_rows_of_a_file(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    train, held_out = (rows_of(split, train=path, eval_size=6) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (14, 6)
    assert sorted([*train, *held_out], key=lambda row: int(row["answer"])) == ROWS
    assert held_out == rows_of("eval", train=path, eval_size=6)
    assert held_out != rows_of("eval", seed=1, train=path, eval_size=6)
    assert held_out == rows_of("eval", train=path, eval_size=6, train_size=3)
    assert len(rows_of(train=path, eval_size=6, train_size=3)) == 3


def test_a_held_out_prompt_is_not_trained_on_through_a_duplicate(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, *ROWS])
    train, held_out = (rows_of(split, train=path, eval_size=6) for split in ("train", "eval"))
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    same = write(tmp_path / "same.jsonl", [ROWS[0]] * 4)
    refused("leaves none to train on", train=same, eval_size=1)


def test_eval_from_its_own_source(tmp_path):
    train, held_out = write(tmp_path / "train.jsonl"), write(tmp_path / "eval.csv", ROWS[:5])
    assert len(rows_of(train=train, eval=held_out)) == 20
    assert len(rows_of("eval", train=train, eval=held_out)) == 5
    assert len(rows_of("eval", train=train, eval=held_out, eval_size=3)) == 3
    assert rows_of("eval", train=train, eval_size=0) == []
    assert len(rows_of("eval", train=train, eval="arithmetic", options={"high": 3}, eval_size=4)) == 4
    assert len(rows_of(train="arithmetic", options={"high": 3}, eval=held_out)) == 9


def test_generated_splits_are_disjoint():
    train, held_out = (rows_of(split, train="arithmetic") for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (272, 128)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert train == rows_of(train="arithmetic", eval="arithmetic")


def test_hub_layout(tmp_path, monkeypatch):
    """A folder in the working directory goes the way of a Hub id, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl")
    write(folder / "test.jsonl", [{"question": "held out", "answer": "1"}])
    assert rows_of(train="owner/name") == ROWS
    assert [row["question"] for row in rows_of("eval", train="owner/name")] == ["held out"]
    one_split = {"train": "owner/name", "eval_split": "train", "eval_size": 5}
    assert len(rows_of(**one_split)) == 15 and len(rows_of("eval", **one_split)) == 5
    refused("data.eval_split: .* no split 'validation'", "eval", train="owner/name", eval_split="validation")
    refused("data.train_split: .* no split 'training'", train="owner/name", train_split="training")
    refused("data.config: got 'main'", train="owner/name", config="main")


def test_hub_refuses():
    refused("'openai/gsm8k' is no file here and the Hub cannot be reached .*data.train=PATH", train="openai/gsm8k")
    refused("neither a file .*, nor a Hub id .*, nor a generated task", train="/no/such/folder")
    refused("'arithmetc' is no generated task; did you mean 'arithmetic'", train="arithmetc")
    refused("did you mean reasoning_gym/chain_sum", train="reasoning-gym/chain_sum")


def test_an_unknown_hub_id(monkeypatch):
    import datasets

    def not_found(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/nothing' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", not_found)
    refused("there is no data set 'owner/nothing' on the Hub .*data.train=PATH", train="owner/nothing")


def test_files_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path)
    refused(r"there is no file .*rows.json; did you mean 'rows.jsonl'\?", train=str(tmp_path / "rows.json"))
    refused("data.eval: there is no file", "eval", train=str(path), eval=str(tmp_path / "no.csv"))
    refused("data.eval: .* is also data.train", train=str(path), eval=str(tmp_path / "." / "rows.jsonl"))
    refused("eval_size: got 11, but .* has 20 rows .* set data.eval_size=10 or less", train=str(path), eval_size=11)
    refused("not a generated task .* remove them", train=str(path), options={"low": 1})
    other = tmp_path / "rows.txt"
    other.write_text("hello", encoding="utf-8")
    refused(r"ends in .txt; convert it to one of .jsonl, .json, .csv, .parquet", train=str(other))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "is empty"),
        ("rows.csv", b"", "is empty"),
        ("rows.csv", b"question,answer\n", "has no rows"),
        ("rows.json", b"[]", "no rows|cannot be read"),
        ("rows.jsonl", b'{"question": "a", "answer": "1"}\n\n{"question": }\n', "cannot be read: line 3 is not JSON"),
        ("rows.json", b'[\n{"question": "a"},\n{"question"}\n]', "cannot be read: line 3 is not JSON"),
        ("rows.jsonl", b'{"question": "\xff\xfe", "answer": "1"}\n', "cannot be read: it is not UTF-8"),
        ("rows.parquet", b"no parquet", "cannot be read: .*[Pp]arquet"),
        ("rows.csv", b'question,answer\n"a,1\n', "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path, capfd, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    refused(message, train=str(path), eval_size=0)
    assert capfd.readouterr() == ("", "")


def test_missing_columns(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    refused(
        r"data.prompt: .* has no column 'questions'; did you mean 'question'\? \(its columns: question, answer\)",
        train=path,
        prompt="questions",
    )
    refused("data.answer: .* has no column 'solution'.*; set data.answer=null", train=path, answer="solution")
    refused("data.template: .* has no column 'hint'", train=path, template="{question} {hint}")
    refused("data.prompt: arithmetic has no column 'problem'", train="arithmetic", prompt="problem")


def test_real_gsm8k():
    if not GSM8K.is_dir():
        pytest.skip("the shared test data is not there")
    data = {"train": str(GSM8K / "train.jsonl"), "eval": str(GSM8K / "test.jsonl"), "config": "main", "eval_size": 256}
    train, held_out = (rows_of(split, **data) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (7473, 256)
    assert all("####" in row["answer"] for row in [*train, *held_out])
