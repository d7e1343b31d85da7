import gzip
import json
from pathlib import Path

import pytest

from lowmem_rlhf.data.sources import load_rows, peek
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig

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


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """Return a maker of folders in the Hub's layout: {file name: content}."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def made(files, name="folder"):
        folder = tmp_path / name
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder)

    return made


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_folder_guesses_no_types(layout):
    typed = lines({"question": "When?", "answer": "2023-10-14"}, {"question": "Code?", "answer": "007"})
    zeros = "question,answer\nCode?,007\nNone?,None\nMissing?,\n"
    zipped = gzip.compress(typed.encode())
    for files, answers in (
        ({"train.jsonl": typed, "test.jsonl": typed}, ["2023-10-14", "007"]),
        ({"data/train.jsonl.gz": zipped}, ["2023-10-14", "007"]),
        ({"train.csv": zeros}, ["007", "None", None]),
        ({"train.csv": zeros.replace(",", ";")}, ["007", "None", None]),
        ({"train.tsv": zeros.replace(",", "\t")}, ["007", "None", None]),
        (
            {
                "README.md": "---\nconfigs:\n- config_name: default\n  data_files: x.csv\n  sep: '|'\n---\n",
                "x.csv": zeros.replace(",", "|"),
            },
            ["007", "None", None],
        ),
    ):
        folder = layout(files, f"folder{len(list(Path(layout({})).parent.glob('folder*')))}")
        rows = rows_of(train=folder, eval_size=0)
        assert [row["answer"] for row in rows] == answers and [row.number for row in rows] == [*range(1, len(rows) + 1)]


def test_parts_of_splits(layout):
    folder = layout({"train.jsonl": lines(*ROWS[:10]), "test.jsonl": lines(*ROWS[10:])})

    def answers(split):
        rows = rows_of(train=folder, train_split=split, eval_size=0)
        return [(row["answer"], row.number) for row in rows]

    every = [(row["answer"], place % 10 + 1) for place, row in enumerate(ROWS)]
    assert answers("train[:30%]") == every[:3]
    assert answers("train[8:]+test[:1]") == every[8:11]
    assert answers("test+train") == every[10:] + every[:10]
    refused(r"data.train_split: .* has no split 'trian\[:10%\]'", train=folder, train_split="trian[:10%]")
    refused("data.train_split: .* has no split 'train.:x.'", train=folder, train_split="train[:x]")
    apart = {"train": folder, "train_split": "train[:50%]", "eval_split": "train[50%:]"}
    assert [row.number for row in rows_of("eval", **apart)] == [6, 7, 8, 9, 10]
    refused("data.eval_split: .* are trained on", "eval", train=folder, eval_split="train[:10%]")
    refused("data.eval_split: .* are trained on", "eval", train=folder, train_split="train+test")


def test_a_split_of_several_files(layout):
    folder = layout({f"train-{n}.jsonl": lines(*ROWS[5 * n : 5 * n + 5]) for n in range(4)})
    rows = rows_of(train=folder, eval_size=0)
    assert rows == ROWS and [row.number for row in rows] == [*range(1, 21)]
    broken = layout({"train-0.jsonl": lines(ROWS[0]), "train-1.jsonl": lines(*ROWS[:2]) + "{"}, "broken")
    refused("broken/train-1.jsonl cannot be read: line 3 is not JSON", train=broken, eval_size=0)


@pytest.mark.parametrize("name", ["d[1]", "what?", "a*b", "d.jsonl", "with space", "#1 100%", "~"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_folders_with_any_name(layout, name, ending, tmp_path):
    import pandas

    frame = pandas.DataFrame(ROWS[:2])
    content = lines(*ROWS[:2]) if ending == "jsonl" else frame.to_parquet()
    other = lines(ROWS[3]) if ending == "jsonl" else pandas.DataFrame(ROWS[3:4]).to_parquet()
    for decoy in ("d1", "whatx", "axb"):
        layout({f"train.{ending}": other}, decoy)
    assert rows_of(train=layout({f"train.{ending}": content}, name), eval_size=0) == ROWS[:2]
    empty = layout({"notes.docx": "x"}, f"empty {name}")
    with pytest.raises(UserError, match=r"the folder .* cannot be read") as caught:
        rows_of(train=empty)
    assert empty in str(caught.value) and "/data;" not in str(caught.value)


def test_field_in_a_folder(layout):
    folder = layout({"train.json": json.dumps({"rows": ROWS[:2], "others": ROWS[2:]})})
    assert rows_of(train=folder, eval_size=0, field="others") == ROWS[2:]
    refused("under several keys of .*folder/train.json: rows, others", train=folder, eval_size=0)
    card = "---\nconfigs:\n- config_name: default\n  data_files: t.json\n  field: rows\n---\n"
    told = layout({"README.md": card, "t.json": json.dumps({"rows": ROWS[:2], "others": ROWS[2:]})}, "told")
    assert rows_of(train=told, eval_size=0) == ROWS[:2]


def test_cards_that_ask_for_other_csv(layout):
    def card(options):
        return f"---\nconfigs:\n- config_name: default\n  data_files: t.csv\n{options}\n---\n"

    named = layout({"README.md": card("  column_names: [question, answer]"), "t.csv": "a,01\nb,\n"}, "named")
    assert [list(row.values()) for row in rows_of(train=named, eval_size=0)] == [["a", "01"], ["b", None]]
    refused("names 2", train=layout({"README.md": card("  names: [a, b]"), "t.csv": "a\n"}, "few"), eval_size=0)
    rows = {"README.md": card("  skiprows: 1"), "t.csv": "x\nq,a\n1,2\n"}
    refused(r"not supported \(skiprows\); .*data.train=FILE", train=layout(rows, "skips"))


def test_a_data_set_of_the_hub_without_the_hub(tmp_path, monkeypatch):
    """What was fetched once lies in the Hub's cache, and is read from there."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "datasets--owner--codes"
    snapshot = repository / "snapshots" / "1234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1234567")
    (snapshot / "train.csv").write_text("question,answer\nCode?,007\n")
    assert rows_of(train="owner/codes", eval_size=0) == [{"question": "Code?", "answer": "007"}]
    refused("has no split 'test'", "eval", train="owner/codes")
    refused("'owner/other' is no file here and the Hub cannot be reached", train="owner/other")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "other.jsonl").write_text("{}")
    refused("did you mean 'owner/other.jsonl'", train="owner/other")


def test_files_of_the_hub_are_downloaded_and_read(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "train.jsonl").write_text(lines({"question": "When?", "answer": "2023-10-14"}))
    builder = datasets.load_dataset_builder("json", data_files={"train": str(tmp_path / "train.jsonl")})
    builder.config.data_files = {"train": [f"file://{tmp_path}/train.jsonl"]}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    assert rows_of(train="owner/name", eval_size=0) == [{"question": "When?", "answer": "2023-10-14"}]


@pytest.fixture
def saved(tmp_path):
    import datasets

    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    both["train"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    return tmp_path


def test_what_save_to_disk_wrote(saved):
    one, two = str(saved / "one"), str(saved / "two")
    assert rows_of(train=one, eval_size=0) == rows_of(train=two, eval_size=0) == ROWS
    assert rows_of(train=one, eval_size=0, train_split="whatever") == ROWS
    train, held_out = (rows_of(split, train=one, eval_size=6) for split in ("train", "eval"))
    assert sorted([*train, *held_out], key=lambda row: row.number) == ROWS and len(held_out) == 6
    assert all(ROWS[row.number - 1] == row for row in [*train, *held_out])
    assert len(rows_of("eval", train=two)) == 3
    refused("data.train_split: .*two' has no split 'validation'.*train", train=two, train_split="validation")
    assert len(rows_of("eval", train=one, eval=two, eval_split="test")) == 3
    refused("data.eval: .* is also data.train", "eval", train=two, eval=str(saved / "." / "two" / "train"))
    refused("data.eval: .* is also data.train", "eval", train=one, eval=str(saved / "two" / ".." / "one"))
    (saved / "one" / "state.json").write_text("{")
    refused("the folder .*one cannot be read", train=one)


def test_rows_know_their_numbers(tmp_path):
    path = write(tmp_path / "rows.csv")
    train, held_out = (rows_of(split, train=path, eval_size=6, train_size=7) for split in ("train", "eval"))
    assert len(train) == 7 and all(ROWS[row.number - 1] == row for row in [*train, *held_out])
    assert not {row.number for row in train} & {row.number for row in held_out}
    assert [row.number for row in rows_of(train="arithmetic", train_size=3)] == [1, 2, 3]


def test_peek(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"more": 1}])
    columns, rows = peek(DataConfig(train=path, prompt="no such column", answer=None))
    assert columns == ["question", "answer", "more"] and rows == ROWS
    assert [row.number for row in peek(DataConfig(train=path), rows=3)[1]] == [1, 2, 3]
    columns, rows = peek(DataConfig(train="arithmetic", options={"high": 3}), rows=5)
    assert columns == ["question", "answer"] and len(rows) == 5
    with pytest.raises(UserError, match="there is no file"):
        peek(DataConfig(train=str(tmp_path / "no.csv")))
    refused("data.field: got 'data', but .*rows.csv is no JSON file", train=write(tmp_path / "rows.csv"), field="data")


def test_one_file_under_two_names_is_not_held_out(tmp_path, layout):
    path = tmp_path / "rows.jsonl"
    write(path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "soft.jsonl").symlink_to(path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    for other in (path, tmp_path / "soft.jsonl", tmp_path / "hard.jsonl", tmp_path / "sub" / ".." / "rows.jsonl"):
        refused("data.eval: .* is also data.train", "eval", train=str(path), eval=str(other))
        refused("data.eval: .* is also data.train", train=str(path), eval=str(other))
    folder = layout({"train.jsonl": lines(*ROWS), "test.jsonl": lines(*ROWS[:2])})
    refused("data.eval: .* is also data.train", "eval", train=folder, eval=f"{folder}/train.jsonl")
    refused("data.eval: .* is also data.train", "eval", train=f"{folder}/train.jsonl", eval=folder, eval_split="train")
    assert len(rows_of("eval", train=folder, eval=f"{folder}/test.jsonl")) == 2


def test_a_row_may_lack_a_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "a"}, *ROWS])
    assert rows_of(train=path, eval_size=0)[0] == {"question": "a"}
    assert len(rows_of("eval", train=path, eval_size=5)) == 5


def test_hub_refuses():
    refused("'openai/gsm8k' is no file here and the Hub cannot be reached .*data.train=PATH", train="openai/gsm8k")
    refused("neither a file .*, nor a Hub id .*, nor a generated task", train="/no/such/folder")
    refused("'arithmetc' is no generated task; did you mean 'arithmetic'", train="arithmetc")
    refused("did you mean reasoning_gym/chain_sum", train="reasoning-gym/chain_sum")


def test_an_unknown_hub_id(monkeypatch):
    import datasets

    def not_found(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/nothing' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", not_found)
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
    refused(r"is not read \(.txt\); write each text as a line .* of a .jsonl file", train=str(other))


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


def test_held_out_by_a_dotted_column(tmp_path):
    made = [{"task": {"text": f"What is {n % 5} + 1?", "more": n}, "answer": str(n)} for n in range(20)]
    for name in ("rows.jsonl", "rows.parquet"):
        path = write(tmp_path / name, made)
        train, held_out = (rows_of(split, train=path, prompt="task.text", eval_size=2) for split in ("train", "eval"))
        assert len(held_out) == 2 and all(made[row.number - 1] == row for row in [*train, *held_out])
        asked = {row["task"]["text"] for row in held_out}
        assert [row for row in made if row["task"]["text"] not in asked] == train
    refused(r"data.prompt: .* has no column 'tsak.text'", train=path, prompt="tsak.text")


def test_pairs_without_a_prompt_column_are_held_out_by_what_they_share(tmp_path):
    def chat(n, answer):
        return [{"role": "user", "content": f"Say {n % 5}"}, {"role": "assistant", "content": answer}]

    def dialogue(n, answer):
        return f"\n\nHuman: Say {n % 5}\n\nAssistant: {answer}"

    for form in (chat, dialogue):
        pairs = [{"chosen": form(n, f"yes {n}"), "rejected": form(n, f"yes or no {n}")} for n in range(20)]
        data = {"prompt": None, "answer": None, "chosen": "chosen", "rejected": "rejected", "eval_size": 2}
        path = write(tmp_path / "pairs.jsonl", pairs)
        train, held_out = (rows_of(split, train=path, **data) for split in ("train", "eval"))
        hidden = {(row.number - 1) % 5 for row in held_out}
        assert [row.number - 1 for row in train] == [n for n in range(20) if n % 5 not in hidden]


@pytest.mark.parametrize("source", ["/root/../etc/no/such", "#"])  # what no path can be is refused by the schema
def test_no_text_is_a_source_by_accident(source):
    with pytest.raises(UserError, match=r"^data\.train: "):
        rows_of(train=source)
