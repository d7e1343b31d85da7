"""Rows of the training and the held-out split of a recipe, from a file, the Hub or a generated task."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.data.prompts import check_columns, used_columns
from lowmem_rlhf.data.readers import is_file, read_file, read_hub
from lowmem_rlhf.data.tasks import ARITHMETIC, REASONING_GYM, Row, Split, generate, is_generated
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe import DataConfig
from lowmem_rlhf.suggest import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(data: DataConfig, split: Split, seed: int = 0) -> list[Row]:
    """Return the rows of one split, a function of (data, seed) alone.

    The held-out rows are, in this order: `data.eval` where it is given; the `eval_split` of a Hub data set; problems of
    a generated task that are never trained on; rows taken out of the training file (training then also loses every
    other row with the same prompt). `eval_size` 0 holds nothing out and gives an empty list. At most half of a file or
    of a problem space can be held out; a separate source or split with fewer rows than `eval_size` is used whole.

    Raises:
        UserError: no such file, data set, split, task, option or column; unreadable or empty data; `eval_size` too
        large.
    """
    _check_sources(data)
    if split == "eval" and data.eval_size == 0:
        return []
    rows = _eval_rows(data, seed) if split == "eval" else _train_rows(data, seed)
    if rows:
        check_columns(rows[0], data, _source(data, split))
    return rows


def _source(data: DataConfig, split: Split) -> str:
    return data.eval if split == "eval" and data.eval else data.train


def _check_sources(data: DataConfig) -> None:
    for key, source in (("data.train", data.train), ("data.eval", data.eval)):
        if source is None or is_generated(source) or is_file(source):
            continue
        if "/" not in source and not Path(source).is_dir() and (hint := did_you_mean(source, [ARITHMETIC])):
            raise UserError(f"{key}: {source!r} is no generated task{hint} (a Hub data set is written owner/name)")
        if source.split("/")[0] != "reasoning_gym" and did_you_mean(source.split("/")[0], ["reasoning_gym"]):
            raise UserError(f"{key}: got {source!r}; did you mean {REASONING_GYM}{source.partition('/')[2] or 'TASK'}?")
    if data.options and not any(is_generated(source) for source in (data.train, data.eval or "")):
        raise UserError(
            f"data.options: got {data.options}, but {data.train!r} is not a generated task "
            f"({ARITHMETIC}, {REASONING_GYM}TASK) and has no options; remove them"
        )
    if data.eval and is_file(data.train) and is_file(data.eval) and _resolved(data.eval) == _resolved(data.train):
        raise UserError(
            f"data.eval: {data.eval} is also data.train, so the held-out rows would be trained on; leave data.eval out "
            "to hold eval_size rows out of it"
        )


def _resolved(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _train_rows(data: DataConfig, seed: int) -> list[Row]:
    if is_generated(data.train):
        held_out = data.eval_size if data.eval in (None, data.train) else 0
        return generate(data.train, data.options, "train", seed, data.train_size, held_out)
    table = _read(data.train, data, "train")
    if _holds_out(data):
        return _take(table, _kept(table, data, seed), data.train_size, seed)
    return _take(table, range(len(table)), data.train_size, seed)


def _eval_rows(data: DataConfig, seed: int) -> list[Row]:
    source = data.eval or data.train
    if is_generated(source):
        options = data.options if source == data.train or not is_generated(data.train) else {}
        return generate(source, options, "eval", seed, data.train_size, data.eval_size)
    if _holds_out(data):
        table = _read(data.train, data, "train")
        return _take(table, _held_out(table, data, seed), None, seed)
    table = _read(source, data, "eval")
    return _take(table, range(len(table)), data.eval_size, seed)


def _holds_out(data: DataConfig) -> bool:
    """Whether the held-out rows come out of the training table."""
    if data.eval_size == 0 or is_generated(data.train) or data.eval not in (None, data.train):
        return False
    return is_file(data.train) or data.eval_split == data.train_split


def _read(source: str, data: DataConfig, split: Split) -> "Dataset":
    key = f"data.{split}" if _source(data, split) == source and (split == "train" or data.eval) else "data.train"
    if is_file(source):
        table = read_file(source, key)
    else:
        table = read_hub(
            source, data.config, data.train_split if split == "train" else data.eval_split, f"data.{split}"
        )
    check_columns(table.column_names, data, source)
    return table


def _held_out(table: "Dataset", data: DataConfig, seed: int) -> list[int]:
    if 2 * data.eval_size > len(table):
        raise UserError(
            f"data.eval_size: got {data.eval_size}, but {data.train} has {len(table)} rows and at most half of them "
            f"can be held out; set data.eval_size={len(table) // 2} or less, or give held-out data with data.eval"
        )
    return sorted(random.Random(f"held-out/{seed}").sample(range(len(table)), data.eval_size))


def _kept(table: "Dataset", data: DataConfig, seed: int) -> list[int]:
    columns = [table[name] for name in used_columns(data)]
    prompts = [json.dumps(values, sort_keys=True, default=str) for values in zip(*columns, strict=True)]
    hidden = {prompts[index] for index in _held_out(table, data, seed)}
    kept = [index for index, prompt in enumerate(prompts) if prompt not in hidden]
    if not kept:
        raise UserError(
            f"data.eval_size: holding {data.eval_size} rows out of {data.train} leaves none to train on, because its "
            "rows share their prompts; give held-out data with data.eval, or set data.eval_size=0"
        )
    return kept


def _take(table: "Dataset", indices: Iterable[int], size: int | None, seed: int) -> list[dict[str, Any]]:
    chosen = list(indices)
    if size is not None and size < len(chosen):
        chosen = sorted(random.Random(f"take/{seed}").sample(chosen, size))
    return list(table.select(chosen))
