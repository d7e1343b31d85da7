"""Files as people have them: encodings, compressions, shapes of JSON, dialects of CSV, and what is refused."""

import bz2
import gzip
import json
import logging
import lzma
import math
import os

import pytest

from lowmem_rlhf import paths
from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.data.readers import read_file
from lowmem_rlhf.data.values import JsonFloat, is_missing, text_of
from lowmem_rlhf.errors import UserError


@pytest.fixture
def read(tmp_path):
    """Return a reader of a content (text or bytes) under a name: the rows as plain values."""

    def made(name, content, field=None):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [dict(row) for row in read_file(str(path), "data.train", field)]

    return made


@pytest.fixture
def refused(read):
    def made(name, content, message, field=None):
        with pytest.raises(UserError, match=message) as caught:
            read(name, content, field)
        assert "\n" not in str(caught.value) and "data." in str(caught.value)

    return made


ROWS = [{"q": "Où est la mer ?", "a": "là-bas"}, {"q": "雪", "a": "neige"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "q,a\nOù est la mer ?,là-bas\n雪,neige\n"


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(read, name, encoding):
    text = json.dumps(ROWS, ensure_ascii=False) if name == "d.json" else CSV if name == "d.csv" else LINES
    assert read(name, text.encode(encoding)) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES.splitlines()[0].replace("雪", "").encode("latin-1"), r"line 1, byte 8 .*0xf9\).*iconv -f WINDOWS-1252"),
        ('{"q": "a"}\n\n{"q": "“b”"}\n'.encode("cp1252"), r"it is not UTF-8 text \(line 3, byte 19 .*0x93"),
        (LINES.encode("utf-16-le"), "UTF-16LE without a byte order mark; .*iconv -f UTF-16LE -t UTF-8"),
        (LINES.encode("utf-16-be"), "iconv -f UTF-16BE"),
        ("\ufeff".encode("utf-16-le") + b"{\x00}", r"not UTF-16-LE text.*\(byte 4\)"),
    ],
)
def test_other_encodings_are_named(refused, content, message):
    refused("d.jsonl", content, message)


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compression(read, refused, ending, compress):
    assert read(f"d.jsonl.{ending}", compress(LINES.encode())) == ROWS
    assert read(f"d.csv.{ending}", compress(CSV.encode("utf-16"))) == ROWS
    assert read("named_wrongly.jsonl", compress(LINES.encode())) == ROWS
    refused(f"cut.jsonl.{ending}", compress(LINES.encode() * 50)[:-20], "data are damaged or end too early .*again")
    spoilt = bytearray(compress(LINES.encode() * 50))
    spoilt[len(spoilt) // 2] ^= 0xFF
    refused(f"spoilt.jsonl.{ending}", bytes(spoilt), "data are damaged|not UTF-8|not JSON")
    refused(f"not.csv.{ending}", CSV, f"not compressed as its ending .{ending} says")
    refused(f"none.jsonl.{ending}", compress(b""), "has no rows")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("d.zip", "unpack it"),
        ("d.tar.gz", "unpack it"),
        ("d.jsonl.zst", "unzstd"),
        ("d.xlsx", "save the sheet as CSV"),
        ("d.pkl", "to_parquet"),
        ("d.arrow", "save_to_disk"),
        ("d.TXT", "data.text=text"),
        ("d.txt.gz", "data.text=text"),
        ("d.docx", "convert it to one of .jsonl"),
        ("d", "ends in nothing"),
    ],
)
def test_other_formats_are_refused_with_what_to_do(refused, name, remedy):
    refused(name, "x", remedy)


@pytest.mark.parametrize(
    ("asked", "there"),
    [("d.json", "d.jsonl"), ("d.csv", "d.jsonl"), ("trian.jsonl", "train.jsonl"), ("D.JSONL", "d.jsonl.gz")],
)
def test_a_file_with_a_near_name_is_suggested(tmp_path, asked, there):
    (tmp_path / there).write_text("x")
    with pytest.raises(UserError, match=rf"there is no file .*; did you mean '{there}'\?"):
        read_file(str(tmp_path / asked), "data.train")


# JSON


def test_json_keeps_types_and_literals(read):
    text = '{"i": 5, "big": 12345678901234567890, "z": -0, "f": 1.50, "e": 1e3, "t": true, "n": null, "s": "5"}\n'
    (row,) = read("d.jsonl", text)
    assert row == {"i": 5, "big": 12345678901234567890, "z": 0, "f": 1.5, "e": 1000.0, "t": True, "n": None, "s": "5"}
    assert [type(row[key]) for key in "ifts"] == [int, JsonFloat, bool, str]
    literals = ["5", "12345678901234567890", "-0", "1.50", "1e3", "true", "5"]
    assert [text_of(row[key]) for key in ("i", "big", "z", "f", "e", "t", "s")] == literals
    # 5 beside 1.5 stays 5, a missing number is missing, and a number in an object keeps its literal
    rows = read("d.jsonl", '{"a": 5}\n{"a": 1.5}\n{"a": NaN}\n{"b": {"x": [1.50, -0, "ä"]}}\n')
    assert [text_of(row["a"]) for row in rows[:2]] == ["5", "1.5"]
    assert math.isnan(rows[2]["a"]) and is_missing(rows[2]["a"]) and "a" not in rows[3]
    assert text_of(rows[3]["b"]) == '{"x": [1.50, -0, "ä"]}'


def test_columns_are_all_keys_in_order(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"b": 1}\n{"a": 1, "b": 2}\n{"c": null}\n')
    assert read_file(str(path), "data.train").column_names == ["b", "a", "c"]


def test_rows_know_their_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\r\n{"a": "x\xe2\x80\xa8y"}\r\n\n \t\n{"a": "\xc2\x85"}')
    rows = list(read_file(str(path), "data.train"))
    assert [(row.number, row["a"]) for row in rows] == [(2, "x\u2028y"), (5, "\x85")]


DEEP = '{"a": ' + "[" * 101 + "]" * 101 + "}"
DEEPER = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"a": }', r"is not JSON: Expecting value \(column 7\)"),
        ('{"a": "x', r"is not JSON: (Unterminated string|Invalid control character)"),
        ('{"a": 1} {"a": 2}', "is not JSON: Extra data"),
        ("[1, 2]", "is not a JSON object with a value for each column"),
        ("7", "is not a JSON object"),
        ("'a'", "is not JSON"),
        ('{"a": Infinity}', "holds Infinity, which is no JSON number"),
        ('{"a": [{"b": -Infinity}]}', "holds -Infinity"),
        ('{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice"),
        ('{"a": {"c": 1, "c": 1}}', "has the key 'c' twice"),
        (r'{"a": "x\ud83d"}', r"holds half of a character \(\\ud83d"),
        (r'{"\uDE00": "x"}', r"holds half of a character \(\\ude00"),
        ('{"a": ' + "9" * 5000 + "}", "holds a whole number of 5000 digits"),
        (DEEP, "holds lists or objects more than 100 deep"),
        (DEEPER, "holds lists or objects more than 100 deep"),
        ('{"a": "tab\tin it"}', "is not JSON: Invalid control character at column 11; a line break"),
    ],
)
def test_a_broken_line_is_named(refused, broken, message):
    good = '{"a": "\u2028\x85"}'
    refused("d.jsonl", f"{good}\n\n{good}\n{broken}\n{good}\n", f"line 4 {message}")
    if not broken.startswith("{") or "Extra" in message:
        return
    # The same in a list over several lines: where the object begins, or where JSON breaks.
    refused("d.json", f"[\n{good},\n{good},\n{broken},\n{good}\n]", f"(line 4|line 5|line 3|row 3).* {message}")


def test_a_pair_of_surrogates_is_a_character(read):
    assert read("d.jsonl", r'{"a": "\ud83d\ude00"}' + "\n") == [{"a": "😀"}]
    assert read("d.json", r'[{"a": "\ud83d\ude00"}]') == [{"a": "😀"}]


TWO = [{"q": "x", "a": "1"}, {"q": "y", "a": "2"}]
SHAPES = {
    "list": TWO,
    "under a key": {"version": 1, "data": TWO},
    "under a key in a key": {"meta": {"by": "me"}, "all": {"rows": TWO}},
    "columns": {"q": ["x", "y"], "a": ["1", "2"]},
    "pandas columns": {"q": {"0": "x", "1": "y"}, "a": {"0": "1", "1": "2"}},
    "pandas index": {"0": TWO[0], "1": TWO[1]},
    "pandas split": {"columns": ["q", "a"], "index": [0, 1], "data": [["x", "1"], ["y", "2"]]},
    "pandas table": {"schema": {"fields": [{"name": "q"}], "pandas_version": "1"}, "data": TWO},
    "rows by id": {"one": TWO[0], "two": TWO[1]},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("indent", [None, 2])
def test_shapes_of_json(read, caplog, shape, indent):
    assert read("d.json", json.dumps(SHAPES[shape], indent=indent)) == TWO
    assert len(caplog.records) == (shape != "list")


def test_what_pandas_writes(read):
    import pandas

    frame = pandas.DataFrame(TWO)
    for orient in ("records", "columns", "index", "split", "table"):
        rows = read(f"{orient}.json", frame.to_json(orient=orient))
        assert [{"q": row["q"], "a": row["a"]} for row in rows] == TWO
    assert read("lines.jsonl", frame.to_json(orient="records", lines=True)) == TWO


def test_objects_one_after_another(read):
    assert read("d.json", "\n".join(json.dumps(row, indent=1) for row in TWO)) == TWO
    assert read("d.jsonl", json.dumps(TWO, indent=1)) == TWO
    assert read("d.jsonl", json.dumps(TWO[0], indent=1)) == TWO[:1]
    assert read("d.ndjson", "\n".join(map(json.dumps, TWO))) == TWO


def test_one_row_stays_one_row(read):
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for row in (
        {"messages": chat},
        {"chosen": chat, "rejected": chat},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"q": "x", "choices": ["a", "b"]},
        {"prompt": chat, "reward_model": {"ground_truth": "5"}},
    ):
        assert read("d.json", json.dumps(row)) == read("d.jsonl", json.dumps(row)) == [row]
    assert read("d.jsonl", '{"tags": ["a", "b"], "words": ["c", "d"]}') == [{"tags": ["a", "b"], "words": ["c", "d"]}]


def test_field(read, refused, caplog):
    both = json.dumps({"train": TWO, "test": TWO[:1], "inner": {"rows": TWO[1:]}, "n": 5})
    assert read("d.json", both, "train") == TWO
    assert read("d.json", both, "inner.rows") == TWO[1:]
    assert read("d.json", json.dumps({"t": SHAPES["columns"]}), "t") == TWO
    assert read("d.jsonl", json.dumps({"messages": TWO}), "messages") == TWO
    refused("d.json", both, "under several keys of .*: train, test; set data.field=train")
    refused("d.json", both, "has no key 'trian'; did you mean 'train'", "trian")
    refused("d.json", both, "'n' of .* holds 5, not rows", "n")
    refused("d.json", json.dumps({"data": []}), "has no rows", "data")
    refused("d.json", json.dumps({"q": ["a"], "a": ["1", "2"]}), r"different lengths \(q 1, a 2\)")
    caplog.clear()
    assert read("d.jsonl", LINES, "data") == ROWS
    assert "data.field has no effect" in caplog.text


# CSV


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("q,a\n1,None\n007,NA\n,\n", [["1", "None"], ["007", "NA"], [None, None]]),
        ('q,a\n"",""\n,""', [["", ""], [None, ""]]),
        ("q,a\nnull,nan\nTrue,2023-10-14\n1e5,-0\n", [["null", "nan"], ["True", "2023-10-14"], ["1e5", "-0"]]),
        ('q,a\r\n"x,\r\n\r\n""y""",z\r\n', [['x,\r\n\r\n"y"', "z"]]),
        ('"q","a"\n5" pipe, x \n', [['5" pipe', " x "]]),
        ("q,a\n\n\nx,\u2028\x85\n", [["x", "\u2028\x85"]]),
        ("\ufeffq,a\nx,y", [["x", "y"]]),
        ('q,a\n"None","007"\n', [["None", "007"]]),
    ],
)
def test_csv_cells_are_texts(read, text, rows):
    assert [list(row.values()) for row in read("d.csv", text)] == rows


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.csv", "q;a\nx, y;1,5\n", "semicolons, not by commas"),
        ("d.csv", "q\ta\nx, y\t1,5\n", "tabs, not by commas"),
        ("d.csv", "q|a\nx, y|1,5\n", "bars, not by commas"),
        ("d.csv", "sep=;\nq;a\nx, y;1,5\n", ""),
        ("d.csv", '"SEP=;"\r\nq;a\r\nx, y;1,5\r\n', ""),
        ("d.tsv", "q\ta\nx, y\t1,5\n", ""),
        ("d.tsv", 'q,a\n"x, y","1,5"\n', "commas, not by tabs"),
        ("d.csv", '"q";"a, or b"\nx, y;1,5\n', "semicolons"),
    ],
)
def test_separators(read, caplog, name, text, said):
    assert [list(row.values()) for row in read(name, text)] == [["x, y", "1,5"]]
    assert said in caplog.text and bool(said) == bool(caplog.records)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,a\nx,y\nz\n", "row 2 has 1 cell, and the header 2"),
        ("q,a\nx,y\n\nSay yes, please,z\n", "row 2 has 3 cells, and the header 2"),
        ('q,a\n"x\n\ny",z\na,b,c\n', "row 2 has 3 cells"),
        ("q,a,q\nx,y,z\n", "two columns have the name 'q'"),
        ("q,,a\nx,y,z\n", "column 2 has no name"),
        ("q,a,\nx,y,\n", "column 3 has no name"),
        ('q,"a\nb",\nx,y,\n', r"column 3 has no name in its first line \(q,a b,\)"),
        ("\ufeff\ufeff", "has no rows"),
        (",q\na,x\n", "column 1 has no name"),
        ('q,a\n"x,y\nz,w\n', "the quote that opens in row 1 is never closed"),
        ('q,a\nx,y\nx,"y\nz,w\n', "the quote that opens in row 2 is never closed"),
        ('q,a\nx,y\n"x,y\nz,w\n', "the quote that opens in row 2 is never closed"),
        ("q,a\n", "has no rows"),
        ("q,a", "has no rows"),
        ("\n\n", "has no rows"),
    ],
)
def test_broken_csv(refused, text, message):
    refused("d.csv", text, message)


def test_the_index_that_pandas_writes_is_left_out(read, caplog):
    import pandas

    assert read("d.csv", pandas.DataFrame(TWO).to_csv()) == TWO
    assert "counts the rows and is left out" in caplog.text


def test_a_row_longer_than_a_block(read):
    long = "x, y\n" * 400_000  # 2 MB; Arrow's usual block is 1 MB
    assert read("d.csv", f'q,a\n1,2\n"{long}",z\n3,4')[1:] == [{"q": long, "a": "z"}, {"q": "3", "a": "4"}]


# Parquet


def parquet(path, table):
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return [dict(row) for row in read_file(str(path), "data.train")]


def test_parquet_keeps_types(tmp_path):
    import datetime

    import pyarrow as pa

    when = datetime.datetime(2023, 10, 14, 12)
    columns = {"when": [when], "text": ["2023-10-14"], "n": [7], "x": [1.5], "none": ["None"], "s": [{"a": ["5"]}]}
    table = pa.table({**columns, "m": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))})
    assert parquet(tmp_path / "d.parquet", table) == [
        {**{name: values[0] for name, values in columns.items()}, "m": {"k": "v"}}
    ]
    as_bytes = pa.table({"text": [b"Paris", "Zürich".encode()], "image": [b"\xff\xd8", b"\x89"]})
    rows = parquet(tmp_path / "b.parquet", as_bytes)
    assert rows == [{"text": "Paris", "image": b"\xff\xd8"}, {"text": "Zürich", "image": b"\x89"}]


def test_folders_of_a_path_are_no_columns(tmp_path):
    import pyarrow as pa

    rows = parquet(tmp_path / "year=2024" / "q=none" / "d.parquet", pa.table({"a": ["1"]}))
    assert rows == [{"a": "1"}]


def test_parquet_refused(refused):
    refused("d.parquet", b"PAR1 no more", "cannot be read: .*[Pp]arquet")
    refused("d.parquet.gz", gzip.compress(b"nothing"), "cannot be read: .*[Pp]arquet")


# What is read, and how often


def test_a_file_is_read_once_and_said_once(tmp_path, caplog):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"data": TWO}))
    first = read_file(str(path), "data.train")
    assert read_file(str(path), "data.eval") is first and len(caplog.records) == 1
    path.write_text(json.dumps({"data": TWO[:1]}))
    assert len(read_file(str(path), "data.train")) == 1


# Paths


@pytest.mark.skipif(os.name == "nt", reason="a path of Windows is one there")
def test_paths_of_windows_where_linux_sees_the_drives(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_MOUNTS", tmp_path)
    folder = tmp_path / "c" / "Users" / "me"
    folder.mkdir(parents=True)
    (folder / "d.jsonl").write_text(LINES)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    for text in (r"C:\Users\me\d.jsonl", "c:/Users/me/d.jsonl", r"C:\\Users\\me\\d.jsonl"):
        assert list(read_file(text, "data.train")) == ROWS
    assert resolve_model(r"C:\Users\me\model") == str(folder / "model")
    with pytest.raises(UserError, match=r"no file D:\\d.jsonl.*written .*/d/d.jsonl, and that is not there"):
        read_file(r"D:\d.jsonl", "data.train")
    with pytest.raises(UserError, match=r"does not exist \(here a path of Windows is written .*/c/models/x"):
        resolve_model(r"C:\models\x")


@pytest.mark.skipif(os.name == "nt", reason="a path of Windows is one there")
def test_other_spellings_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    for name in ("sub/d.jsonl", "back\\slash.jsonl", "~d.jsonl", "C:d.jsonl"):
        (tmp_path / name).write_text(LINES)
    spellings = [
        "~/sub/d.jsonl",
        "sub\\d.jsonl",
        "back\\slash.jsonl",
        "~d.jsonl",
        "C:d.jsonl",
        rf"\\wsl$\Ubuntu{tmp_path}\sub\d.jsonl",
    ]
    for text in spellings:
        assert list(read_file(text, "data.train")) == ROWS
    with pytest.raises(UserError, match="there is no file ~nobody_of_that_name"):
        read_file("~nobody_of_that_name/d.jsonl", "data.train")


def test_logging_is_ours(caplog, read):
    with caplog.at_level(logging.WARNING):
        read("d.json", json.dumps({"data": TWO}))
    assert [record.name for record in caplog.records] == ["lowmem_rlhf.data.readers"]
