"""Hold the memory model of stock fine-tuning against runs that were measured on a card.

    python benchmarks/vram_t4.py [--rows CSV] [--configs FOLDER] [--json]

Each row of the file is a run of stock transformers and peft: how it was trained and what it took, in MiB. The model
(benchmarks/stock_memory/) gets the columns model, quant, dq, prec, attn, opt, r, targets, gc, bs and seq, and the
sizes of the model; it never sees what was measured. Compared are peak_alloc (what torch had allocated at the peak) and
process (what the whole process had taken: reserved memory and the CUDA context, whose size is the column ctx).

Sizes come from FOLDER/ORG__NAME.json, a config.json under that name, or else from what `lowmem-rlhf plan` knows about
the model. Errors are predicted over measured, less one.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stock_memory.stock import StockMemory, StockRun, predict

from lowmem_rlhf.architecture.dimensions import ModelDimensions, from_config_file
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import RunError, UserError

MIB = 2**20
ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "vram" / "t4_measured.csv"
T4 = 15_094  # MiB that torch finds on a Tesla T4 (14.56 to 14.75 GiB, by driver)
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
QUANTIZATIONS = {"nf4": "nf4", "fp4": "nf4", "int8": "int8", "8bit": "int8", "none": "none"}
SETTINGS = ("model", "quant", "prec", "attn", "opt", "r", "targets", "gc", "bs", "seq")
COMPARED = ("allocated", "process")


def options(about: str | None = __doc__) -> argparse.ArgumentParser:
    """Return the options of this script, or of its twin with a docstring of its own."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n\n")[0])
    parser.add_argument(
        "--rows", type=Path, default=ROWS, metavar="CSV", help="measured rows (default: the shared ones)"
    )
    parser.add_argument("--configs", type=Path, metavar="FOLDER", help="config.json files named ORG__NAME.json")
    parser.add_argument("--json", action="store_true")
    return parser


def read_rows(path: Path, *measured: str) -> list[dict[str, str]]:
    """Return the measured rows.

    Args:
        measured: columns that are needed beside the settings; none: those of memory.

    Raises:
        UserError: the file cannot be read or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"--rows: {path} cannot be read ({error})") from error
    needed = {*SETTINGS, *(measured or ("peak_alloc", "process", "ctx"))}
    if not rows or (missing := needed - rows[0].keys()):
        raise UserError(f"--rows: {path} {'lacks ' + ', '.join(sorted(missing)) if rows else 'has no rows'}")
    return rows


def dimensions_of(model: str, configs: Path | None) -> ModelDimensions:
    """Return the sizes of a model.

    Raises:
        UserError: there is no config, or it is unknown or wrong.
    """
    path = configs / f"{model.replace('/', '__')}.json" if configs else None
    return from_config_file(path, model) if path and path.is_file() else model_dimensions(model)


def run_of(row: dict[str, str], dimensions: ModelDimensions) -> StockRun:
    """Return the run that a row describes.

    Raises:
        UserError: a column has a value that the model does not know.
    """
    try:
        return StockRun(
            dimensions=dimensions,
            batch_size=int(row["bs"]),
            sequence_length=int(row["seq"]),
            quantization=QUANTIZATIONS[row["quant"].lower()],  # type: ignore[arg-type]
            double_quantization=row.get("dq", "False") == "True",
            precision=PRECISIONS[row["prec"]],  # type: ignore[arg-type]
            attention={"eager": "eager", "sdpa": "sdpa"}[row["attn"]],  # type: ignore[arg-type]
            optimizer=row["opt"].lower(),
            r=int(row["r"]),
            targets=tuple("all-linear" if name == "all" else name for name in row["targets"].split("+")),
            gradient_checkpointing=row["gc"] == "True",
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"a row of {row['model']} has a value that is not known: {error}") from error


def predicted(run: StockRun, context: float) -> StockMemory:
    """Predict on a T4. What was measured did fit; where the prediction does not, it is made without a limit."""
    try:
        return predict(run, capacity=int((T4 - context) * MIB))
    except RunError:
        return predict(run)


def compare(row: dict[str, str], configs: Path | None) -> dict[str, Any]:
    """Return a row's settings, predictions and measurements in MiB, and errors; load and forward where measured."""
    dimensions = dimensions_of(row["model"], configs)
    context = float(row["ctx"])
    memory = predicted(run_of(row, dimensions), context)
    found = {
        "load": (memory.load / MIB, "load_MiB"),
        "forward": (memory.forward / MIB, "peak_fwd"),
        "allocated": (memory.allocated / MIB, "peak_alloc"),
        "process": (memory.reserved / MIB + context, "process"),
    }
    measured = {name: float(row[column]) for name, (_, column) in found.items() if row.get(column)}
    return {
        **{name: row[name] for name in SETTINGS},
        "predicted": {name: value for name, (value, _) in found.items()},
        "measured": measured,
        "error": {name: found[name][0] / value - 1 for name, value in measured.items()},
        "parts": {name: size / MIB for name, size in memory.parts.items() if size},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the errors of allocated and of process memory: mean of the sizes, worst, and mean with sign."""
    found = {}
    for name in COMPARED:
        errors = [row["error"][name] for row in rows]
        found[name] = {
            "mean": statistics.mean(map(abs, errors)),
            "worst": max(errors, key=abs),
            "signed": statistics.mean(errors),
        }
    return found


def report(rows: list[dict[str, str]], configs: Path | None) -> dict[str, Any]:
    """Compare all rows; those that cannot be predicted are listed with the reason."""
    compared, skipped = [], []
    for row in rows:
        try:
            compared.append(compare(row, configs))
        except UserError as error:
            skipped.append({"model": row["model"], "reason": str(error)})
    if not compared:
        raise UserError(f"no row can be predicted; the first says: {skipped[0]['reason']}")
    models = dict.fromkeys(row["model"] for row in compared)
    return {
        "rows": compared,
        "skipped": skipped,
        "total": summary(compared),
        "by_model": {model: summary([row for row in compared if row["model"] == model]) for model in models},
    }


def print_tables(found: dict[str, Any]) -> None:
    """Print the figures for people."""
    print(f"{'':<48}{'allocated (MiB)':>26}{'process (MiB)':>26}")
    print(f"{'run':<48}" + 2 * f"{'model':>9}{'measured':>9}{'error':>8}")
    for row in found["rows"]:
        what = f"{row['model'].rsplit('/', 1)[-1]} {row['quant']} {row['attn']} {row['bs']} x {row['seq']}"
        print(f"{what:<48}" + "".join(_figures(row, name) for name in COMPARED))
    print(f"\n{'errors':<48}" + 2 * f"{'mean':>9}{'worst':>9}{'signed':>8}")
    for name, errors in (*found["by_model"].items(), ("all", found["total"])):
        count = sum(name in ("all", row["model"]) for row in found["rows"])
        percent = "".join(
            f"{errors[kind]['mean']:>9.2%}{errors[kind]['worst']:>+9.2%}{errors[kind]['signed']:>+8.2%}"
            for kind in COMPARED
        )
        print(f"{name.rsplit('/', 1)[-1] + f' ({count} rows)':<48}{percent}")
    for row in found["skipped"]:
        print(f"not predicted: {row['model']}: {row['reason']}")


def _figures(row: dict[str, Any], name: str) -> str:
    return f"{row['predicted'][name]:>9.0f}{row['measured'][name]:>9.0f}{row['error'][name]:>+8.2%}"


def main(arguments: Sequence[str] | None = None) -> None:
    options_ = options().parse_args(arguments)
    try:
        found = report(read_rows(options_.rows), options_.configs)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    if options_.json:
        print(json.dumps(found, indent=2))
    else:
        print_tables(found)


if __name__ == "__main__":
    main()
