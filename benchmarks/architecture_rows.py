"""A model type's row: its parts one after another, and the verdict that follows from them."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from architecture_checks import ended, exactness, off, rounded, told
from architecture_runs import gguf, merge, plan, train, write_recipe
from architecture_table import COLUMNS
from tiny_architectures import save_tiny

Row = dict[str, Any]
Tell = Callable[[str], None]


def row_of(name: str, quick: bool, tell: Tell = lambda part: None) -> Row:
    """Return a type's row.

    Args:
        name: as `tiny_architectures.model_types` gives it.
        quick: only log-probs and gradients in fp32 and bfloat16.
        tell: called with the name of each part before it begins.
    """
    row: Row = {"type": name}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        tell("build")
        try:
            folder = save_tiny(name, Path(scratch) / "tiny")
        except Exception as error:
            return {**row, "verdict": "not_built", "why": told(error)}
        numbers(row, folder, Path(scratch) / "adapter", quick, tell)
        if not quick and row["fp32"].get("verdict") != "stock_fails":
            whole_runs(row, folder, Path(scratch), tell)
    row["seconds"] = round(time.perf_counter() - began, 1)
    return judged(row)


def numbers(row: Row, folder: Path, adapter: Path, quick: bool, tell: Tell) -> None:
    """Fill in what is held against stock number by number; the other dtypes only where fp32 came to its end."""
    tell("fp32")
    first: Row = {}
    row["fp32"] = ended(first, partial(exactness, folder, adapter, first))
    if "verdict" in first:
        return
    targets = first.get("targets", "all-linear")
    for column, quantization in {"bf16": "none"}.items() if quick else {"bf16": "none", "nf4": "nf4"}.items():
        tell(column)
        found: Row = {}
        row[column] = ended(found, partial(rounded, folder, adapter, found, quantization, "bfloat16", targets))


def whole_runs(row: Row, folder: Path, scratch: Path, tell: Tell) -> None:
    """Fill in what the command line does with the model; of one that was refused, that it says so there too."""
    targets, refused = row["fp32"].get("targets"), "verdict" in row["fp32"]
    recipes = {name: write_recipe(scratch / f"{name}.yaml", name, folder, targets) for name in ("grpo", "sft")}
    runs = {name: scratch / name for name in recipes}
    parts: dict[str, Callable[[Row], None]] = {"plan": partial(plan, recipes["grpo"], folder)}
    for name, recipe in recipes.items():
        parts[name] = partial(train, recipe, runs[name])
    parts |= {"merge": partial(merge, runs["sft"], folder), "gguf": partial(gguf, runs["sft"])}
    for column, part in parts.items():
        if (refused and column not in ("plan", "grpo")) or (column in ("merge", "gguf") and "verdict" in row["sft"]):
            continue
        tell(column)
        found: Row = {}
        row[column] = ended(found, partial(part, found))


def judged(row: Row) -> Row:
    """Add the verdict and its reason, which follow from the parts."""
    if "verdict" in row:
        return row
    parts = {column: row[column] for column in COLUMNS if column in row}
    failed = {column: part for column, part in parts.items() if part.get("verdict") == "traceback"}
    wrong = {column: names for column, part in parts.items() if (names := off(part))}
    first = row["fp32"]
    if first.get("verdict") == "stock_fails":
        verdict, why = "stock_fails", first["why"]
    elif failed:
        verdict = "traceback"
        why = "; ".join(f"{c}{', ' + p['stage'] if 'stage' in p else ''}: {p['why']}" for c, p in failed.items())
    elif wrong:
        verdict, why = "wrong", "; ".join(f"{column}: {', '.join(names)}" for column, names in wrong.items())
    elif "verdict" in first:
        verdict, why = first["verdict"], first["why"]
    else:
        verdict, why = first["way"], first["note"]
    return {"type": row["type"], "verdict": verdict, "why": why, **row}
