"""Files as they are found: stand-ins of Git LFS, and folders with more data than their splits."""

import gzip

import pytest

from lowmem_rlhf.data.sources import load_rows
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"
LINE = '{"question": "Hi", "answer": "007"}\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.parquet.xz"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match="git lfs pull"):
        load_rows(DataConfig(train=str(tmp_path / name), eval_size=0), "train")


@pytest.mark.parametrize(
    ("others", "unread"),
    [
        (("b.csv",), "b.csv"),
        (("more/b.jsonl", "notes.md"), "more/b.jsonl"),
        (("b.csv", "c.tsv"), "b.csv, c.tsv"),
        (("test.jsonl", ".cache/b.csv", "dataset_infos.json", "README.md"), ""),
    ],
)
def test_data_files_that_are_in_no_split(tmp_path, caplog, others, unread):
    (tmp_path / "train.jsonl").write_text(LINE)
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = "{}" if name == "dataset_infos.json" else LINE
        (tmp_path / name).write_text("question,answer\na,b\n" if name.endswith("csv") else rows)
    for _ in range(2):
        (row,) = load_rows(DataConfig(train=str(tmp_path), eval_size=0), "train")
        assert row["answer"] == "007"
    assert not [one for one in caplog.records if "card" in one.getMessage()]
    lines = [one.getMessage() for one in caplog.records if "not read" in one.getMessage()]
    assert len(lines) == bool(unread)
    assert not unread or lines[0].endswith(f": {unread}")


def test_small_parquet_still_reads(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["Hi"], "answer": ["007"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for name in ("a.parquet", "a.parquet.gz"):
        (row,) = load_rows(DataConfig(train=str(tmp_path / name), eval_size=0), "train")
        assert row == {"question": "Hi", "answer": "007"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'question,answer\nHi,"Hello" he said\n'),
        ("a.csv", 'question,answer\n\n"Hi" she asked,Hello\n'),
        ("a.tsv", 'question\tanswer\n"Hi", she asked\t007\n'),
        ("a.csv", 'question;answer\n"a ""b"" c" d;e\n'),
    ],
)
def test_quotes_that_would_be_lost(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="row 1 has a cell that begins with a quote"):
        load_rows(DataConfig(train=str(tmp_path / name), eval_size=0), "train")


def test_quotes_that_stay(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\nHe said "hi",5"\n"a ""b""\n, c", "d"\n')
    rows = load_rows(DataConfig(train=str(tmp_path / "a.csv"), eval_size=0), "train")
    assert [list(row.values()) for row in rows] == [['He said "hi"', '5"'], ['a "b"\n, c', ' "d"']]
