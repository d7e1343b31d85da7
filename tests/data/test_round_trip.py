"""Rows that a format can hold arrive as what was written: values, types, and the literals of numbers."""

import bz2
import datetime
import gzip
import itertools
import json
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem_rlhf.data.readers import read_file
from lowmem_rlhf.data.values import JsonFloat, JsonInt, text_of

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
# What guessing takes for something else, and what line splitting cuts.
TRAPS = ["None", "NA", "null", "nan", "007", "1e5", "-0", "True", "2023-10-14", "2023-10-14T10:00:00Z", "", " ", "  x "]
TRAPS += [
    "a\u2028b\u2029c\x85d",
    "x\r\ny\rz\n",
    '"',
    '""',
    "'",
    ",;\t|",
    "\\",
    "\ufeff",
    "\x00",
    "{}",
    "[1]",
    "#",
    "\x1a",
]
TEXTS = st.sampled_from(TRAPS) | st.text(max_size=12)
# A file that begins with these would be one in another encoding.
NAMES = st.text(min_size=1, max_size=6).filter(lambda name: name[0] != "\ufeff" and "\x00" not in name)
COUNT = itertools.count()
quick = settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def arrived(folder, ending, content, compression=""):
    path = folder / f"d{next(COUNT)}{ending}{compression}"
    path.write_bytes(COMPRESS[compression](content))
    rows = list(read_file(str(path), "data.train"))
    path.unlink()
    return rows


class Number:
    """A number as it is written."""

    def __init__(self, literal):
        self.literal = literal


NUMBERS = st.from_regex(
    r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,2})?", fullmatch=True, alphabet="0123456789.-+eE"
)
VALUES = st.recursive(
    st.none() | st.booleans() | TEXTS | NUMBERS.map(Number),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def written(value, ascii_only):
    """Return JSON text, with the literals of numbers."""
    if isinstance(value, Number):
        return value.literal
    if isinstance(value, list):
        return f"[{', '.join(written(part, ascii_only) for part in value)}]"
    if isinstance(value, dict):
        parts = (
            f"{json.dumps(key, ensure_ascii=ascii_only)}:{written(part, ascii_only)}" for key, part in value.items()
        )
        return f"{{{','.join(parts)}}}"
    return json.dumps(value, ensure_ascii=ascii_only)


def same(got, value):
    if isinstance(value, Number):
        whole = value.literal.lstrip("-").isdigit()
        assert text_of(got) == value.literal
        assert type(got) is (JsonFloat if not whole else JsonInt if value.literal == "-0" else int)
        assert got == (int(value.literal) if whole else float(value.literal))
    elif isinstance(value, list):
        assert type(got) is list and len(got) == len(value)
        for one, other in zip(got, value, strict=True):
            same(one, other)
    elif isinstance(value, dict):
        assert isinstance(got, dict) and list(got) == list(value)
        for key, part in value.items():
            same(got[key], part)
    else:
        assert type(got) is type(value) and got == value


@quick
@given(
    rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=4), min_size=1, max_size=5),
    ending=st.sampled_from([".jsonl", ".json"]),
    compression=st.sampled_from(list(COMPRESS)),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    newline=st.sampled_from(["\n", "\r\n", "\n\n"]),
    ascii_only=st.booleans(),
)
def test_json(folder, rows, ending, compression, encoding, newline, ascii_only):
    lines = [written(row, ascii_only) for row in rows]
    text = f"[{f',{newline}'.join(lines)}]" if ending == ".json" else newline.join(lines)
    got = arrived(folder, ending, text.encode(encoding), compression)
    assert len(got) == len(rows)
    for one, row in zip(got, rows, strict=True):
        same(one, row)
    step = 2 if newline == "\n\n" and ending == ".jsonl" else 1
    assert [row.number for row in got] == [1 + step * place for place in range(len(rows))]


def cell(value, separator):
    """Return a cell as RFC 4180 has it: only what is missing is empty without quotes."""
    if value is None:
        return ""
    if not value or any(mark in value for mark in (separator, '"', "\r", "\n")):
        return '"' + value.replace('"', '""') + '"'
    return value


@quick
@given(data=st.data(), names=st.lists(NAMES, min_size=2, max_size=4, unique=True))
def test_csv(folder, data, names):
    rows = data.draw(st.lists(st.tuples(*[st.none() | TEXTS for _ in names]), min_size=1, max_size=5))
    separator, ending = data.draw(st.sampled_from([(",", ".csv"), ("\t", ".tsv")]))
    newline = data.draw(st.sampled_from(["\n", "\r\n"]))
    text = newline.join(separator.join(cell(value, separator) for value in row) for row in [names, *rows])
    content = (text + newline * data.draw(st.booleans())).encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig"])))
    got = arrived(folder, ending, content, data.draw(st.sampled_from(list(COMPRESS))))
    assert [tuple(row.values()) for row in got] == rows and all(list(row) == names for row in got)
    assert [row.number for row in got] == list(range(1, len(rows) + 1))


KINDS = {
    pa.string(): TEXTS,
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.timestamp("us"): st.datetimes(min_value=datetime.datetime(1900, 1, 1), max_value=datetime.datetime(2200, 1, 1)),
    pa.date32(): st.dates(min_value=datetime.date(1900, 1, 1)),
    pa.list_(pa.string()): st.lists(TEXTS, max_size=3),
    pa.struct({"a": pa.string(), "b": pa.int64()}): st.fixed_dictionaries({"a": TEXTS, "b": st.integers(0, 9)}),
}


@quick
@given(data=st.data(), kinds=st.dictionaries(NAMES, st.sampled_from(list(KINDS)), min_size=1, max_size=4))
def test_parquet(folder, data, kinds):
    row = st.fixed_dictionaries({name: st.none() | KINDS[kind] for name, kind in kinds.items()})
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    file = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, pa.schema(kinds)), file)
    got = arrived(folder, ".parquet", file.getvalue().to_pybytes(), data.draw(st.sampled_from(["", ".gz"])))
    assert got == rows
    for one, row in zip(got, rows, strict=True):
        assert all(type(one[name]) is type(value) for name, value in row.items())
