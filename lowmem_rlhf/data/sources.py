"""Rows of the training and the held-out split of a recipe, from a file, a folder, the Hub or a generated task."""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from lowmem_rlhf.data.columns import check_columns, used_columns
from lowmem_rlhf.data.few_shot import file_rows
from lowmem_rlhf.data.folders import is_saved, read_folder
from lowmem_rlhf.data.readers import read_file, same_file
from lowmem_rlhf.data.row_stream import RowStream, open_stream
from lowmem_rlhf.data.table import Table
from lowmem_rlhf.data.tasks import Split, generate
from lowmem_rlhf.data.values import Row, numbered, value_at
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.paths import local_path, obstacle
from lowmem_rlhf.recipe.data_sources import ARITHMETIC, FORMATS, REASONING_GYM, ending, is_file, is_folder, is_generated
from lowmem_rlhf.recipe.python_objects import is_python, python_object
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import DataConfig
from lowmem_rlhf.recipe.tasks import of_task
from lowmem_rlhf.suggest import did_you_mean


def load_rows(data: DataConfig, split: Split, seed: int = 0) -> list[Row]:
    """Return the rows of one split, a function of (data, seed) alone. Each has its number in its source, from 1.

    The held-out rows are, in this order: `data.eval` where it is given; the `eval_split` of a Hub data set; problems of
    a generated task that are never trained on; rows taken out of the training file (training then also loses every
    other row with the same prompt). `eval_size` 0 holds nothing out and gives an empty list. At most half of a file or
    of a problem space can be held out; a separate source or split with fewer rows than `eval_size` is used whole.

    With `data.streaming` the training rows are those of the first window (see `data.streaming`), and held-out rows that
    come out of the training source are its first ones.

    Raises:
        UserError: no such file, data set, split, task, option or column; unreadable or empty data; held-out rows that
        are also training rows; `eval_size` too large.
    """
    _check_sources(data)
    if split == "eval" and data.eval_size == 0:
        return []
    return _eval_rows(data, seed) if split == "eval" else _train_rows(data, seed)


@dataclass(frozen=True)
class SplitRows:
    """The rows of one task: those to train on, those that are held out, and the solved examples of a file."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    few_shot: Sequence[Row] = ()


def load_tasks(recipe: Recipe) -> dict[str, SplitRows]:
    """Return the rows of each task of a recipe (see `Recipe.by_task`).

    Raises:
        UserError: as of `load_rows`.
    """
    seed, rows = recipe.training.seed, {}
    for task, own in recipe.by_task.items():
        with of_task(task):
            train, held_out = load_rows(own.data, "train", seed), load_rows(own.data, "eval", seed)
            rows[task] = SplitRows(train, held_out, file_rows(own.data))
    return rows


def peek(data: DataConfig, split: Split = "train", rows: int = 20) -> tuple[list[str], list[Row]]:
    """Return the columns and the first rows of a split's source, whatever columns the recipe names.

    Raises:
        UserError: as `load_rows`, except for columns.
    """
    _check_sources(data)
    source = split_source(data, split)
    if is_generated(source):
        made = numbered(generate(source, data.options, "train", 0, rows, 0))
        return list(made[0]), made
    if data.streaming and (source == data.train or has_splits(source)):
        first = list(islice(row_stream(data, split).rows(), rows))
        return list(dict.fromkeys(name for row in first for name in row)), first
    table = _table(source, data, split)
    return table.column_names, table.rows(range(min(rows, len(table))))


def holds_out(data: DataConfig) -> bool:
    """Whether the held-out rows come out of the training table, and not from a source or split of their own."""
    if data.eval_size == 0 or is_generated(data.train) or data.eval not in (None, data.train):
        return False
    return not has_splits(data.train) or data.eval_split == data.train_split


def has_splits(source: str) -> bool:
    """Whether a source has splits by name: a folder or a data set of the Hub, unless `Dataset.save_to_disk` made it."""
    return not (is_generated(source) or is_python(source) or is_file(source) or is_saved(source))


def split_source(data: DataConfig, split: Split) -> str:
    """Return the source that a split's rows come from."""
    return data.eval if split == "eval" and data.eval else data.train


def _check_sources(data: DataConfig) -> None:
    for key, source in (("data.train", data.train), ("data.eval", data.eval)):
        if source is not None and not is_python(source) and (why := obstacle(local_path(source))):
            raise UserError(f"{key}: {source} {why}; give a file or a folder that holds rows")
        if source is None or is_generated(source) or is_python(source) or is_file(source) or is_folder(source):
            continue
        if "/" not in source and (hint := did_you_mean(source, [ARITHMETIC])):
            raise UserError(f"{key}: {source!r} is no generated task{hint} (a Hub data set is written owner/name)")
        if source.split("/")[0] != "reasoning_gym" and did_you_mean(source.split("/")[0], ["reasoning_gym"]):
            raise UserError(f"{key}: got {source!r}; did you mean {REASONING_GYM}{source.partition('/')[2] or 'TASK'}?")
    if data.options and not any(is_generated(source) for source in (data.train, data.eval or "")):
        raise UserError(
            f"data.options: got {data.options}, but {data.train!r} is not a generated task "
            f"({ARITHMETIC}, {REASONING_GYM}TASK) and has no options; remove them"
        )
    if data.field is not None and not any(_may_be_json(source) for source in (data.train, data.eval) if source):
        raise UserError(f"data.field: got {data.field!r}, but {data.train} is no JSON file; remove data.field")
    if data.eval and is_file(data.train) and is_file(data.eval) and same_file(data.eval, data.train):
        raise _also_trained(data)


def _may_be_json(source: str) -> bool:
    if is_generated(source) or is_python(source):
        return False
    return not is_file(source) or FORMATS.get(ending(source)) == "json"


def _also_trained(data: DataConfig) -> UserError:
    return UserError(
        f"data.eval: {data.eval} is also data.train, so the held-out rows would be trained on; leave data.eval out to "
        "hold eval_size rows out of it"
    )


def row_stream(data: DataConfig, split: Split) -> RowStream:
    """Return all rows of a split's source, read as they are needed.

    Raises:
        UserError: it cannot be streamed, or is not there.
    """
    source, name = split_source(data, split), data.train_split if split == "train" else data.eval_split
    return open_stream(source, data.config, name, f"data.{split}", lambda: _table(source, data, split))


def may_learn(data: DataConfig, held_out: Sequence[Row]) -> Callable[[Row], bool]:
    """Return what says of a row of a streamed source that no row held out of it has the same prompt."""
    names = _prompt_names(data)
    hidden = {_prompt_key(row, names, data) for row in held_out} if holds_out(data) else set()
    return lambda row: not hidden or _prompt_key(row, names, data) not in hidden


def _first_rows(data: DataConfig) -> tuple[list[Row], list[Row]]:
    """Return the first window of a streamed source, and the rows before it, which are held out."""
    rows = row_stream(data, "train").rows()
    held_out = list(islice(rows, data.eval_size if holds_out(data) else 0))
    first = list(islice(rows, data.shuffle_buffer))
    if not first:
        remedy = "; lower data.eval_size, or give held-out data with data.eval" if held_out else ""
        behind = f" behind the {len(held_out)} that are held out" if held_out else ""
        raise UserError(f"data.train: {data.train} has no rows{behind}; it must hold at least one{remedy}")
    check_columns(dict.fromkeys(name for row in held_out + first for name in row), data, data.train)
    learns = may_learn(data, held_out)
    if not (kept := [row for row in first if learns(row)]):
        raise UserError(
            f"data.eval_size: the first {data.shuffle_buffer} rows behind the {len(held_out)} that are held out have "
            "the same prompts; give held-out data with data.eval, or set data.eval_size=0"
        )
    return kept, held_out


def _first_held_out(data: DataConfig) -> list[Row]:
    """Return the first rows of a split or a folder of its own, of a streamed set."""
    stream = row_stream(data, "eval")
    if stream.origins & row_stream(data, "train").origins:
        raise _also_trained(data)
    rows = list(islice(stream.rows(), data.eval_size))
    if not rows:
        raise UserError(
            f"data.eval: {data.eval or data.train} has no held-out rows; name others, or set data.eval_size=0"
        )
    check_columns(dict.fromkeys(name for row in rows for name in row), data, split_source(data, "eval"))
    return rows


def _train_rows(data: DataConfig, seed: int) -> list[Row]:
    if data.streaming:
        return _first_rows(data)[0]
    if is_generated(data.train):
        held_out = data.eval_size if data.eval in (None, data.train) else 0
        return _generated(data.train, data.options, data, "train", seed, held_out)
    table = _read(data.train, data, "train")
    if holds_out(data):
        return _take(table, _kept(table, data, seed), data.train_size, seed)
    return _take(table, range(len(table)), data.train_size, seed)


def _eval_rows(data: DataConfig, seed: int) -> list[Row]:
    source = data.eval or data.train
    if is_generated(source):
        options = data.options if source == data.train or not is_generated(data.train) else {}
        return _generated(source, options, data, "eval", seed, data.eval_size)
    if holds_out(data):
        if data.streaming:
            return _first_rows(data)[1]
        table = _read(data.train, data, "train")
        return _take(table, _held_out(table, data, seed), None, seed)
    if data.streaming and has_splits(source):
        return _first_held_out(data)
    table = _read(source, data, "eval")
    _check_apart(table, data)
    return _take(table, range(len(table)), data.eval_size, seed)


def _generated(
    source: str, options: dict[str, Any], data: DataConfig, split: Split, seed: int, held_out: int
) -> list[Row]:
    rows = numbered(generate(source, options, split, seed, data.train_size, held_out))
    if rows:
        check_columns(rows[0], data, source)
    return rows


def _read(source: str, data: DataConfig, split: Split) -> Table:
    table = _table(source, data, split)
    check_columns(table.column_names, data, source)
    return table


def _table(source: str, data: DataConfig, split: Split) -> Table:
    key = f"data.{split}" if split_source(data, split) == source and (split == "train" or data.eval) else "data.train"
    if is_python(source):
        given: Table = python_object(source, key)
        return given
    if is_file(source):
        return read_file(source, key, data.field)
    name = data.train_split if split == "train" else data.eval_split
    return read_folder(source, data.config, name, f"data.{split}", data.field)


def _check_apart(table: Table, data: DataConfig) -> None:
    """Check that no row of the held-out table is one that is trained on: a folder may hold the other's file."""
    own_source = data.eval not in (None, data.train)
    if is_generated(data.train) or (is_file(data.train) and is_file(data.eval or data.train)):
        return
    if not own_source and not set("[+").intersection(data.train_split + data.eval_split):
        return
    if data.streaming:
        origins = row_stream(data, "train").origins
        if not any(origins & its for its, _ in table.pieces()):
            return
    elif not _table(data.train, data, "train").shares_rows(table):
        return
    if own_source:
        raise _also_trained(data)
    raise UserError(
        f"data.eval_split: {data.eval_split!r} of {data.train} has rows of data.train_split ({data.train_split!r}), "
        "which are trained on; give parts that are apart (train[:90%] and train[90%:]), or the same split for both to "
        "hold eval_size rows out of it"
    )


def _held_out(table: Table, data: DataConfig, seed: int) -> list[int]:
    if 2 * data.eval_size > len(table):
        raise UserError(
            f"data.eval_size: got {data.eval_size}, but {data.train} has {len(table)} rows and at most half of them "
            f"can be held out; set data.eval_size={len(table) // 2} or less, or give held-out data with data.eval"
        )
    return sorted(random.Random(f"held-out/{seed}").sample(range(len(table)), data.eval_size))


def _kept(table: Table, data: DataConfig, seed: int) -> list[int]:
    names = _prompt_names(data)
    prompts = [_prompt_key(row, names, data) for row in table.parts(names)]
    hidden = {prompts[index] for index in _held_out(table, data, seed)}
    kept = [index for index, prompt in enumerate(prompts) if prompt not in hidden]
    if not kept:
        raise UserError(
            f"data.eval_size: holding {data.eval_size} rows out of {data.train} leaves none to train on, because its "
            "rows share their prompts; give held-out data with data.eval, or set data.eval_size=0"
        )
    return kept


def _prompt_names(data: DataConfig) -> list[str]:
    names = used_columns(data)
    return [*names, data.rejected] if data.prompt is None and data.rejected is not None else names


def _prompt_key(row: Mapping[str, Any], names: Sequence[str], data: DataConfig) -> str:
    return json.dumps(_prompt_of(row, names, data), sort_keys=True, default=str)


def _prompt_of(row: Mapping[str, Any], names: Sequence[str], data: DataConfig) -> list[Any]:
    """Return what rows with the same prompt share: of a pair without a prompt column, what both answers begin with."""
    values = [value_at(row, name) for name in names]
    if data.prompt is not None or len(values) != 2:
        return values
    for kind in (list, str):
        if all(isinstance(value, kind) for value in values):
            shared = [one for one, _ in takewhile(lambda both: both[0] == both[1], zip(*values, strict=False))]
            return shared if kind is list else ["".join(shared).rpartition("Assistant:")[0]]
    return values


def _take(table: Table, indices: Iterable[int], size: int | None, seed: int) -> list[Row]:
    chosen = list(indices)
    if size is not None and size < len(chosen):
        chosen = sorted(random.Random(f"take/{seed}").sample(chosen, size))
    return table.rows(chosen)


def is_on_hub(source: str) -> bool:
    """Return whether a source is a data set of the Hub."""
    return has_splits(source) and not local_path(source).is_dir()
