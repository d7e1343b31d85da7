"""`data.streaming`: the rows that a file has, a bounded part of them at a time, in an order that a resume keeps."""

import bz2
import gzip
import json
import lzma
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_runs import learned, save_tiny_model, tiny_recipe, tiny_values, write_jsonl

from lowmem_rlhf.data import row_stream as row_stream_module
from lowmem_rlhf.data import streaming as module
from lowmem_rlhf.data.curriculum import stream_of
from lowmem_rlhf.data.examples import read_tasks
from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.data.row_stream import RowStream
from lowmem_rlhf.data.sources import load_rows, load_tasks, peek, row_stream
from lowmem_rlhf.data.streaming import WindowStream
from lowmem_rlhf.data.values import text_of
from lowmem_rlhf.engine.tokenizer import load_tokens
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.recipe.sections import DataConfig
from lowmem_rlhf.report import html
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.turns import Turns

ROWS = [{"question": f"{n}\nof \u00e4", "answer": str(n), "note": None if n % 3 else f'"{n}"; x'} for n in range(23)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_stream_module, "_BLOCK", 5)


def as_csv(rows, separator=","):
    def cell(value):
        return "" if value is None else '"' + value.replace('"', '""') + '"'

    lines = [separator.join(rows[0]), "", *(separator.join(map(cell, row.values())) for row in rows)]
    return "\r\n".join(lines) + "\r\n"


def parquet(path, rows, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def files(folder):
    """Write the rows in each format; return the sources."""
    import datasets

    text = "\n\n".join(json.dumps({**row, "x": 0}).replace('"x": 0', '"x": 1.50') for row in ROWS)
    (folder / "a.jsonl").write_text(f"\ufeff\n{text}", encoding="utf-8")
    (folder / "b.json.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "c.jsonl").write_text(text, encoding="utf-16")
    (folder / "d.csv").write_text(as_csv(ROWS), encoding="utf-8", newline="")
    (folder / "e.csv.bz2").write_bytes(bz2.compress(as_csv(ROWS, ";").encode()))
    (folder / "f.tsv").write_text(f"sep=;\n{as_csv(ROWS, ';')}", encoding="utf-8", newline="")
    parquet(folder / "g.parquet", ROWS, row_group_size=7)
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "h.parquet")
    for name in ("shards", "tables"):
        (folder / name).mkdir()
    lines = text.split("\n\n")
    (folder / "shards" / "train-0.jsonl").write_text("\n".join(lines[:11]))
    (folder / "shards" / "train-1.jsonl").write_text("\n".join(lines[11:]))
    parquet(folder / "tables" / "train-0.parquet", ROWS[:10], row_group_size=4)
    parquet(folder / "tables" / "train-1.parquet", ROWS[10:])
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    names = ("a.jsonl", "b.json.gz", "c.jsonl", "d.csv", "e.csv.bz2", "f.tsv", "g.parquet", "h.parquet")
    return [str(folder / name) for name in (*names, "shards", "tables", "saved")]


def literal(rows):
    return [text_of(dict(row)) for row in rows]


def test_the_rows_of_a_stream_are_those_of_the_whole_from_any_place(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for source in files(tmp_path):
        data = DataConfig(train=source, eval_size=0, answer=None)
        whole, stream = literal(load_rows(data, "train")), row_stream(data, "train")
        assert len(whole) == 23
        for start in (0, 1, 4, 5, 11, 22, 23, 40):
            rows = list(stream.rows(start))
            assert literal(rows) == whole[start:], (source, start)
            assert [row.number for row in rows] == list(range(start + 1, 24)), (source, start)
        names, first = peek(data.model_copy(update={"streaming": True}))
        assert literal(first) == whole[:20] and names[:2] == ["question", "answer"]


def test_files_of_the_hub_are_opened_where_they_lie(tmp_path, monkeypatch):
    import datasets

    (file := tmp_path / "train.jsonl").write_text('{"question": "When?", "answer": "2023-10-14"}\n')
    builder = datasets.load_dataset_builder("json", data_files={"train": str(file)})
    builder.config.data_files = {"train": [f"file://{file}"], "test": [f"file://{file}"]}
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    data = DataConfig(train="owner/name", streaming=True, eval_size=0)
    assert load_rows(data, "train") == [{"question": "When?", "answer": "2023-10-14"}]
    with pytest.raises(UserError, match=r"is also data\.train"):
        load_rows(data.model_copy(update={"eval_size": 1}), "eval")
    with pytest.raises(UserError, match=r"data\.train_split: .* has no split 'all' \(it has train, test\)"):
        load_rows(data.model_copy(update={"train_split": "all"}), "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"question": "1"}]', "is one JSON document, which is read as a whole; write it as JSON lines"),
        ("a.jsonl", '{\n"question": "1"\n}', "is one JSON document"),
        ("a.jsonl", '{"question": "1"}\n' * 7 + "{", "cannot be read: line 8 is not JSON"),
        ("a.jsonl", '{"question": "1"}\n' * 7 + "\udcff", r"it is not UTF-8 text \(behind line"),
        ("a.csv", "question,b\n" + "1,2\n" * 7 + "1,2,3\n", "behind the first 5, row 3 has 3 cells, and the header 2"),
        ("a.csv", "question,b\n" + "1,2\n" * 7 + '1,"2\n' * 9, "behind row 7: unexpected end of data|row 7"),
        ("a.csv", "question,b\n", "has no rows; it must hold at least one"),
        ("a.jsonl.gz", "question", "it is not compressed as its ending .gz says"),
        ("a.parquet", "question", "cannot be read: .*Parquet"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
    ],
)
def test_what_cannot_be_streamed(tmp_path, name, content, message):
    (file := tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        load_rows(DataConfig(train=str(file), streaming=True, eval_size=0, answer=None), "train")
    assert "data.train: " in str(caught.value) and "\n" not in str(caught.value)


def test_sources_that_are_no_files(tmp_path):
    with pytest.raises(UserError, match="arithmetic is generated and lies on no disk"):
        load_rows(DataConfig(train="arithmetic", streaming=True, eval_size=0), "train")
    write_jsonl(tmp_path / "train.jsonl", [{"question": "1"}])
    with pytest.raises(UserError, match=r"data\.train_split: got 'train\[:50%\]', and parts of splits are known only"):
        load_rows(DataConfig(train=str(tmp_path), train_split="train[:50%]", streaming=True, eval_size=0), "train")


def test_the_first_rows_are_held_out_and_their_prompts_not_learned(tmp_path):
    rows = [{"question": str(n % 9), "answer": "1"} for n in range(30)]
    data = DataConfig(train=str(write_jsonl(tmp_path / "a.jsonl", rows)), streaming=True, eval_size=4, shuffle_buffer=8)
    held_out, first = load_rows(data, "eval"), load_rows(data, "train")
    assert [row.number for row in held_out] == [1, 2, 3, 4]
    assert [row["question"] for row in first] == ["4", "5", "6", "7", "8"]  # of the rows 5 to 12
    windows = module.Windows(data, module.SplitRows(first, held_out))
    found = [windows.window(n) for n in (0, 1, 2, 3, 4, 1)]
    assert [[row.number for row in one] for one in found[:4]] == [
        *([*range(5, 10)], [*range(14, 19)], [23, 24, 25, 26, 27]),
        [],
    ]
    assert found[4] is None and found[5] == found[1]
    with pytest.raises(UserError, match="the first 8 rows behind the 9 that are held out have the same prompts"):
        load_rows(data.model_copy(update={"eval_size": 9}), "train")
    with pytest.raises(UserError, match="has no rows behind the 30 that are held out"):
        load_rows(data.model_copy(update={"eval_size": 30}), "train")


WINDOWS = [[*range(0, 6)], [], [*range(6, 10)], [*range(10, 16)], [16]]


def in_windows(read=None, windows=WINDOWS, per_step=4):
    def window(number):
        if read is not None:
            read.append(number)
        return list(windows[number]) if number < len(windows) else None

    return WindowStream(window, per_step, seed=3)


def test_an_epoch_has_each_example_once_window_by_window_and_each_its_own_order():
    stream = in_windows()
    epochs = [[stream.at(17 * epoch + place) for place in range(17)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [*range(17)]
        assert set(epoch[:6]) == {*range(6)} and set(epoch[6:10]) == {*range(6, 10)} and epoch[16] == 16
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    order = [one for epoch in epochs for one in epoch][:40]
    assert [one for step in range(10) for one in in_windows().batch(step)] == order
    turns = Turns(in_windows(), WINDOWS[0])  # as where groups without a difference are replaced
    assert [one for count in (3, 30, 7) for one in turns.take(count, 0)] == order


def test_a_resumed_stream_reads_no_window_before_its_place():
    before, read = in_windows(), []
    expected = [before.batch(step) for step in range(9)]
    for step in range(1, 9):
        stopped = in_windows()
        for earlier in range(step):
            stopped.batch(earlier)
        read.clear()
        resumed = in_windows(read)
        resumed.load_state(json.loads(json.dumps(stopped.state())))
        assert [resumed.batch(later) for later in range(step, 9)] == expected[step:]
        assert read[0] >= (0, 0, 2, 3, 0, 0, 0, 0, 0)[step]
        anew = in_windows()  # without what was kept it is found out again
        anew.load_state(None)
        assert anew.batch(step) == expected[step]
    assert Counter(read) and max(read) <= 5


def test_another_file_under_way_is_an_error():
    stream = in_windows()
    stream.load_state({"kept": [5, 0, 4, 6, 1], "whole": True})
    with pytest.raises(RunError, match="has changed since this run read it"):
        stream.batch(0)
    with pytest.raises(UserError, match="all rows are left out"):
        in_windows(windows=[[], []]).batch(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("streaming-model"))


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(html, "write_report", lambda run: None)


def streamed(model, file, **changes):
    data = {"train": str(file), "template": "{ask}=", "streaming": True, "shuffle_buffer": 40, "bad_rows": "drop"}
    own = {"train_size": None, "eval_size": 4, "max_prompt_length": 12, **data}
    changes["data"] = {**own, **changes.get("data", {})}
    return tiny_recipe(model, **changes)


def test_memory_does_not_grow_with_the_file(model, tmp_path, monkeypatch):
    """Rows and examples are counted while they live: of a file of 3 MB never more than a few windows."""
    with (file := tmp_path / "rows.jsonl").open("w") as out:
        for number in range(20_000):
            out.write(json.dumps({"ask": f"{number}+1", "answer": str(number + 1), "more": "x" * 100}) + "\n")
    alive, most, read = Counter(), Counter(), Counter()

    def counted(kind, thing):
        alive[kind] += 1
        read[kind] += 1
        most[kind] = max(most[kind], alive[kind])
        weakref.finalize(thing, lambda: alive.subtract({kind: 1})).atexit = False
        return thing

    rows_of = RowStream.rows
    monkeypatch.setattr(RowStream, "rows", lambda self, start=0: (counted("row", r) for r in rows_of(self, start)))
    made = Example.__init__
    monkeypatch.setattr(Example, "__init__", lambda self, *a, **k: (made(self, *a, **k), counted("example", self))[0])
    recipe = streamed(model, file, training={"prompts_per_step": 50})
    stream = stream_of(read_tasks(recipe, load_tasks(recipe), load_tokens(recipe.model)).train, recipe)
    before = read["row"]
    seen = [example.prompt for step in range(100) for example in stream.batch(step)]
    assert len(set(seen)) == 5000 and 5000 <= read["row"] - before <= 5000 + 3 * 40 + 4
    assert most["row"] <= 5 * 40 and most["example"] <= 5 * 40


def test_what_is_left_out_is_counted_and_told_now_and_then(model, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module, "message", said.append)
    asks = ["1" * 40 if n % 3 == 2 else f"{n}+" for n in range(400)]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"ask": ask, "answer": "1"} for ask in asks])
    recipe = streamed(model, file, data={"eval_size": 1})
    stream = stream_of(read_tasks(recipe, load_tasks(recipe), load_tokens(recipe.model)).train, recipe)
    prompts = sorted(stream.at(place).prompt for place in range(266))
    assert prompts == sorted(f"{ask}=" for ask in asks[1:] if len(ask) < 9)
    assert said == [
        "data.streaming: 107 rows are left out so far (one: row 282: its prompt has 41 tokens, data.max_prompt_length "
        "is 12)"
    ]


def rows(count):
    return [{"ask": f"{n}+{n % 7}", "answer": f" {n}"} for n in range(count)]


@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_a_resumed_run_is_the_uninterrupted_one(model, tmp_path, monkeypatch, no_report, algorithm):
    own = {"algorithm": "sft", "sft": {"max_length": 24}, "rewards": []} if algorithm == "sft" else {}
    section = {"training": {"max_steps": 4, "prompts_per_step": 5, "save_steps": 1}, "data": {"shuffle_buffer": 13}}
    section["generation"] = {"num_generations": 2, "max_completion_length": 6}
    recipe = streamed(model, write_jsonl(tmp_path / "rows.jsonl", rows(60)), **own, **section)
    whole = train(recipe, tmp_path / "whole")
    stops, batch = [], WindowStream.batch

    def stopping(self, number):
        if number == 3 and not stops:
            stops.append(number)
            raise KeyboardInterrupt
        return batch(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WindowStream, "batch", stopping)
        train(recipe, tmp_path / "stopped")
    read, of_window = [], module.Windows.window
    monkeypatch.setattr(module.Windows, "window", lambda self, n: read.append(n) or of_window(self, n))
    resumed = train(recipe, tmp_path / "stopped", resume=True)
    assert read == [1]  # the places 15 to 19 of windows of 13; those before are known from the checkpoint
    one, other = learned(whole), learned(resumed)
    torch.testing.assert_close(one.pop("adapter"), other.pop("adapter"), rtol=0, atol=0)
    assert one == other
    assert RunDirectory(tmp_path / "whole").inputs()["data"]["train"]["rows"] == 13
    write_jsonl(tmp_path / "rows.jsonl", rows(60)[1:])
    with pytest.raises(UserError, match=r"--resume: the rows of .* are not those that the run began with"):
        train(recipe, tmp_path / "stopped", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"bad_rows": "error"}}, "data.streaming: rows are read while the run goes on, .* data.bad_rows=drop"),
        ({"data": {"curriculum": {"column": "n"}}}, "data.streaming: data.curriculum sorts all rows"),
        ({"data": {"train_size": 9}}, "data.streaming: data.train_size draws from all rows"),
        ({"grpo": {"set_aside_steps": 2}}, "data.streaming: grpo.set_aside_steps keeps account of all prompts"),
        (
            {"algorithm": "sft", "rewards": [], "training": {"num_train_epochs": 1}},
            "data.streaming: training.num_train_epochs needs the number of rows; .* set training.max_steps",
        ),
        ({"algorithm": "reward_model", "rewards": []}, "data.streaming: reward_model reads all rows before it trains"),
        ({"data": {"shuffle_buffer": 0}}, "data.shuffle_buffer: "),
        (
            {"tasks": [{"name": "a"}]},
            "data.streaming: is for one data set; leave it out, or the tasks",
        ),
    ],
)
def test_what_needs_the_whole_set_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        streamed("m", "rows.jsonl", **changes)


def test_the_command_says_how_many_rows_it_has_looked_at(lowmem_rlhf, model, tmp_path):
    import yaml

    values = tiny_values(model)
    file = write_jsonl(tmp_path / "rows.jsonl", rows(60))
    values["data"] = {"train": str(file), "template": "{ask}=", "streaming": True, "shuffle_buffer": 30}
    values["data"] |= {"bad_rows": "drop", "eval_size": 6}
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    told = json.loads(lowmem_rlhf("data", path, "--json").out)
    assert told["train"]["rows"] == 30 and told["eval"]["rows"] == 6 and "steps_per_epoch" not in told["step"]
    assert told["said"] == ["data.streaming: the first 30 training rows were looked at"]
    refused = lowmem_rlhf("data", path, "--measure-difficulty", 2, "--output", tmp_path / "hard.jsonl")
    assert refused.code == 2 and "data.streaming never has them all" in refused.err


def test_a_file_whose_first_compressed_bytes_are_damaged_is_a_sentence(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for name, packed in {"a.jsonl.gz": gzip.compress(text), "b.jsonl.xz": lzma.compress(text)}.items():
        (tmp_path / name).write_bytes(packed[:20] + b"\xff" * 20 + packed[40:])
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(text)[:90])
    for file in sorted(tmp_path.iterdir()):
        data = DataConfig(train=str(file), prompt="question", answer="answer", streaming=True, bad_rows="drop")
        with pytest.raises(UserError, match=rf"{file.name} cannot be read: its compressed data are damaged or end too"):
            load_rows(data, "train")
