"""Data files that people really have, and what must arrive of them."""

import gzip
import json

import pytest

from lowmem_rlhf.data.sources import load_rows, peek
from lowmem_rlhf.data.values import has_column, text_of, value_at
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Return a reader of files, which lie in the working folder: {name: text or bytes}; the first is trained on."""
    monkeypatch.chdir(tmp_path)

    def made(files, **data):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        settings = {"train": next(iter(files), ""), "eval_size": 0, **data}
        return load_rows(DataConfig(**settings), "train")

    return made


def refused(message, rows, files, **data):
    with pytest.raises(UserError, match=message) as caught:
        rows(files, **data)
    assert "\n" not in str(caught.value)


def lines(*values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


# csv_none_and_zeros: CSV readers guess types


@pytest.mark.parametrize(
    ("cells", "answers"),
    [
        (["007", "None", "NA", "01234"], ["007", "None", "NA", "01234"]),
        (["7", "12", ""], ["7", "12", None]),  # a number beside an empty cell
        (["True", "False"], ["True", "False"]),
        (["null", "nan", "N/A", "-", "#N/A", "inf"], ["null", "nan", "N/A", "-", "#N/A", "inf"]),
        (["1e5", "+1", "1_000", "0x1F", "1.0", ".5", "5."], ["1e5", "+1", "1_000", "0x1F", "1.0", ".5", "5."]),
        (["2023-10-14", "10:30", "1/2"], ["2023-10-14", "10:30", "1/2"]),
        (['""', "", '"None"'], ["", None, "None"]),
    ],
)
@pytest.mark.parametrize("name", ["d.csv", "d.tsv"])
def test_csv_none_and_zeros(rows, cells, answers, name):
    text = "question,answer\n" + "".join(f"Which?,{cell}\n" for cell in cells)
    found = rows({name: text.replace(",", "\t") if name == "d.tsv" else text})
    assert [row["answer"] for row in found] == answers


# dates_become_timestamps: JSON readers guess that texts are dates


@pytest.mark.parametrize(
    "answers",
    [
        ["2024-05-01", "1999-12-31"],
        ["2024-05-01T10:00:00Z", "2024-05-01 10:00:00"],
        ["10:30", "12:00:01"],
        ["01/02/2024", "1.2.2024"],
        ["12", "007"],
        [1, "1"],
        [1.50, 1],
        [True, None],
    ],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz"])
def test_dates_become_timestamps(rows, answers, name):
    values = [{"question": "When?", "answer": answer, "date": "2024-05-01"} for answer in answers]
    text = json.dumps(values) if name == "d.json" else lines(*values)
    found = rows({name: gzip.compress(text.encode(), mtime=0) if name.endswith("gz") else text})
    kinds = [float if isinstance(row["answer"], float) else type(row["answer"]) for row in found]
    assert kinds == [type(answer) for answer in answers]
    assert [row["answer"] for row in found] == answers and {row["date"] for row in found} == {"2024-05-01"}


# path_reads_another_file: a file name that is also a pattern


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("d[1].jsonl", ["d1.jsonl"]),
        ("e?.jsonl", ["ex.jsonl"]),
        ("f*.jsonl", ["f1.jsonl", "f2.jsonl"]),
        ("[ab].jsonl", ["a.jsonl"]),
        ("{x,y}.jsonl", ["x.jsonl", "y.jsonl"]),
        ("with space #1 100%.jsonl", ["with"]),
        ("~x.jsonl", ["x.jsonl"]),
        ("a::b.jsonl", ["a", "b.jsonl"]),
        ("train[:1].jsonl", ["train.jsonl"]),
    ],
)
def test_path_reads_another_file(rows, name, others):
    mine, other = {"question": "Mine?", "answer": "mine"}, {"question": "Not mine?", "answer": "other"}
    assert rows({name: lines(mine), **dict.fromkeys(others, lines(other))}) == [mine]


def test_a_pattern_is_no_file(rows):
    other = {"d1.jsonl": lines({"question": "Not mine?", "answer": "other"})}
    for name in ("d[1].jsonl", "d?.jsonl", "*.jsonl"):
        refused("there is no file", rows, other, train=name)
        refused("there is no file|cannot be read|neither", rows, other, train=f"./{name}")


# jsonl_u2028: a line ends at \n alone


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\u001c"])
def test_jsonl_u2028(rows, mark):
    row = {"question": f"First{mark}line?", "answer": f"yes{mark}no"}
    raw = json.dumps(row, ensure_ascii=ord(mark) < 32) + "\n"
    assert rows({"d.jsonl": raw + "\n" + raw}) == [row, row]
    for broken in ('{"question": "Three?", "answer": "c"', "{'question': 1}", '{"question": "x",}'):
        refused(r"d.jsonl cannot be read: line 3 is not JSON", rows, {"d.jsonl": raw + raw + broken + "\n" + raw})
    assert [row.number for row in rows({"d.jsonl": raw + "\r\n" + raw})] == [1, 3]


# json_shapes: rows under a key, a dict of columns, gz, tsv, quoted CSV

SEA = [{"question": "Name a sea.", "answer": "Baltic"}, {"question": "Name a lake.", "answer": "Como"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("top.json", json.dumps({"version": 1, "data": SEA}, indent=1)),
        ("top.json.gz", gzip.compress(json.dumps({"version": 1, "data": SEA}).encode(), mtime=0)),
        ("array.jsonl", json.dumps(SEA, indent=1)),
        ("lines.json", lines(*SEA)),
        ("columns.json", json.dumps({name: [row[name] for row in SEA] for name in SEA[0]})),
        ("by_id.json", json.dumps({"r1": SEA[0], "r2": SEA[1]})),
        ("pretty.json", "\n".join(json.dumps(row, indent=2) for row in SEA)),
        ("d.jsonl.gz", gzip.compress(lines(*SEA).encode(), mtime=0)),
        ("d.jsonl", lines(*SEA).encode("utf-16")),
        ("d.tsv", "question\tanswer\nName a sea.\tBaltic\nName a lake.\tComo\n"),
        ("d.csv", 'question,answer\n"Name a sea.","Baltic"\r\nName a lake.,Como'),
        ("d.csv", "sep=;\nquestion;answer\nName a sea.;Baltic\nName a lake.;Como\n"),
        ("d.csv", "question;answer\nName a sea.;Baltic\nName a lake.;Como\n"),
    ],
)
def test_json_shapes(rows, name, content, caplog):
    assert rows({name: content}) == SEA
    assert peek(DataConfig(train=name))[1] == SEA
    said = sum(word in name for word in ("top", "columns", "by_id")) + (content[:9] == "question;")
    assert len(caplog.records) == said  # once, though it was asked for twice


def test_quoted_csv(rows):
    text = 'question,answer\n"Name a sea,\nplease.","Baltic ""sea"""\n"Name a lake.",Como\n'
    found = rows({"d.csv": text})
    assert [list(row.values()) for row in found] == [["Name a sea,\nplease.", 'Baltic "sea"'], ["Name a lake.", "Como"]]


# save_to_disk_folder: see also test_sources.py


@pytest.mark.parametrize("split", [{}, {"train_split": "test"}, {"train_split": "train[:1]+test"}])
def test_save_to_disk_folder(rows, tmp_path, split, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list(SEA).save_to_disk("one")
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(SEA), "test": datasets.Dataset.from_list(SEA[1:])}
    ).save_to_disk("two")
    assert rows({}, train="one", **split) == SEA
    assert rows({}, train="./two", **split) == (SEA[1:] if split == {"train_split": "test"} else SEA)
    refused("'two' has no split 'dev' .*train.*test", rows, {}, train="two", train_split="dev")


# nested_columns: values inside of a column, by a dotted name


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("reward_model.ground_truth", "5", "5"),
        ("extra.answers.1", 7, "7"),
        ("extra.price", 1.5, "1.50"),
        ("dotted.name", "whole", "whole"),
        ("prompt.0.content", "What is 2+3?", "What is 2+3?"),
        ("extra.answers", [6, 7], "[6, 7]"),
    ],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_nested_columns(rows, column, value, text, name):
    line = (
        '{"prompt": [{"role": "user", "content": "What is 2+3?"}], "reward_model": {"style": "rule", "ground_truth": '
        '"5"}, "extra": {"answers": [6, 7], "price": 1.50}, "dotted.name": "whole", "dotted": {"name": "part"}}'
    )
    (row,) = rows({name: f"[{line}]" if name == "d.json" else line}, prompt="prompt", answer=None)
    assert has_column(row, column) and value_at(row, column) == value and text_of(value_at(row, column)) == text
    for wrong in (f"{column}.x", "reward_model.truth", "extra.answers.2", "extra.answers.x", "nothing.at.all"):
        assert not has_column(row, wrong) and value_at(row, wrong) is None
