"""A model type's row: its parts one after another, and the verdict that follows from them."""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from architecture_checks import ended, exactness, off, rounded, told
from architecture_runs import gguf, merge, plan, train, write_recipe
from architecture_table import COLUMNS, COMMANDS, ENGINE
from tiny_architectures import save_tiny

Row = dict[str, Any]
Tell = Callable[[str], None]


def row_of(name: str, quick: bool, tell: Tell = lambda part: None) -> Row:
    """Return a type's row.

    Args:
        name: as `tiny_architectures.model_types` gives it.
        quick: only what the planner says, and log-probs and gradients in fp32 and bfloat16.
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
        if row["fp32"].get("verdict") != "stock_fails":
            commands(row, folder, Path(scratch), ("plan",) if quick else ("plan", "grpo", "sft", "merge", "gguf"), tell)
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


def commands(row: Row, folder: Path, scratch: Path, columns: Sequence[str], tell: Tell) -> None:
    """Fill in what the command line does with the model; of one that it refuses, that GRPO says so as well."""
    targets = row["fp32"].get("targets")
    recipes = {name: write_recipe(scratch / f"{name}.yaml", name, folder, targets) for name in ("grpo", "sft")}
    runs = {name: scratch / name for name in recipes}
    parts: dict[str, Callable[[Row], None]] = {
        "plan": partial(plan, recipes["grpo"], folder),
        "grpo": partial(train, recipes["grpo"], runs["grpo"]),
        "sft": partial(train, recipes["sft"], runs["sft"]),
        "merge": partial(merge, runs["sft"], folder),
        "gguf": partial(gguf, runs["sft"]),
    }
    for column in columns:
        refused = any("verdict" in row.get(part, {}) for part in ("fp32", "plan"))
        if (refused and column not in ("plan", "grpo")) or (column in ("merge", "gguf") and "verdict" in row["sft"]):
            continue
        tell(column)
        found: Row = {}
        row[column] = ended(found, partial(parts[column], found))


def judged(row: Row) -> Row:
    """Add the verdict and its reason, which follow from the parts; what the planner refuses, nobody can run.

    ``engine`` and ``engine_why`` are those of the parts that are numbers, whatever the planner says.
    """
    if "verdict" in row:
        return row
    engine, engine_why = of_parts(row, ENGINE, row["fp32"])
    verdict, why = engine, engine_why
    if engine != "stock_fails":
        refused = row.get("plan", {}).get("verdict") == "refused"
        verdict, why = of_parts(row, COMMANDS, row["plan"]) if refused else of_parts(row, COLUMNS, row["fp32"])
    return {"type": row["type"], "verdict": verdict, "why": why, "engine": engine, "engine_why": engine_why, **row}


def of_parts(row: Row, columns: Sequence[str], first: Row) -> tuple[str, str]:
    """Return the verdict of some of a row's parts, and its reason; ``first`` decides where none failed."""
    parts = {column: row[column] for column in columns if column in row}
    failed = {column: part for column, part in parts.items() if part.get("verdict") == "traceback"}
    wrong = {column: names for column, part in parts.items() if (names := off(part))}
    if first.get("verdict") == "stock_fails":
        return "stock_fails", first["why"]
    if failed:
        stages = (f"{c}{', ' + p['stage'] if 'stage' in p else ''}: {p['why']}" for c, p in failed.items())
        return "traceback", "; ".join(stages)
    if wrong:
        return "wrong", "; ".join(f"{column}: {', '.join(names)}" for column, names in wrong.items())
    if "verdict" in first:
        return first["verdict"], first["why"]
    return first["way"], first["note"]
