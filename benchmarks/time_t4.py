"""Hold the time of a kernel model against training steps that were measured on a card.

    python benchmarks/time_t4.py [--rows CSV] [--configs FOLDER] [--json]

Each row of the file is a run of stock transformers and peft on a Tesla T4 (see vram_t4.py), with the seconds of a step
in ``step_s``. The step is simulated kernel by kernel (stock_memory/timed.py); a kernel takes as long as its arithmetic
or its bytes, and a constant (`lowmem_rlhf.planning.time.rates`). Two constants are fitted: what share of their products
SDPA's kernels reach, and what each kernel takes beside its work. Each model is predicted with constants fitted to the
rows of the others; a model of the shared rows that is not in the file is left out for nobody.

One configuration repeated differs by 15 % between runs. Errors are predicted over measured, less one.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stock_memory.timed import seconds, step_kernels
from vram_t4 import ROWS, SETTINGS, dimensions_of, options, read_rows, run_of

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.profiles import find_profile
from lowmem_rlhf.planning.time.rates import Rates, rates

_SPEED = find_profile("t4").speed
assert _SPEED is not None, "a T4's speed stands in its profile"
T4 = rates(_SPEED)
ATTENTIONS = tuple(share / 100 for share in range(20, 81, 2))
STARTS = tuple(microseconds * 1e-6 for microseconds in range(8, 41))


def fit(rows: Sequence[dict[str, Any]]) -> Rates:
    """Return the T4's rates with both constants such that the mean size of the errors' logarithms is least."""

    found = []
    for attention in ATTENTIONS:
        for start in STARTS:
            errors = [
                abs(math.log((row["worked"][attention] + start * row["starts"]) / row["measured"])) for row in rows
            ]
            found.append((statistics.mean(errors), attention, start))
    _, attention, start = min(found)
    return replace(T4, attention=attention, start=start)


def timed(row: dict[str, str], configs: Path | None) -> dict[str, Any]:
    """Return a row's settings, what was measured, its kernels' starts, and their work in seconds by `ATTENTIONS`."""
    kernels = step_kernels(run_of(row, dimensions_of(row["model"], configs)))
    return {
        **{name: row[name] for name in SETTINGS},
        "measured": float(row["step_s"]),
        "starts": sum(count * kernel.starts for kernel, count in kernels.items()),
        "worked": {share: seconds(kernels, replace(T4, attention=share, start=0.0)) for share in ATTENTIONS},
    }


def report(rows: list[dict[str, str]], configs: Path | None, fitted_to: list[dict[str, str]]) -> dict[str, Any]:
    """Predict all rows, those of each model with constants fitted to other models.

    Args:
        fitted_to: the rows that constants are fitted to.
    """
    every, skipped = _timed_rows(rows, configs)
    if not every:
        raise UserError(f"no row can be predicted; the first says: {skipped[0]['reason']}")
    known = every if fitted_to is rows else _timed_rows(fitted_to, None)[0]
    constants, compared = {}, []
    for model in dict.fromkeys(row["model"] for row in every):
        others = [row for row in known if row["model"] != model]
        card = fit(others or known)
        constants[model] = {"attention": card.attention, "start": card.start}
        for row in every:
            if row["model"] == model:
                predicted = row["worked"][card.attention] + card.start * row["starts"]
                shown = {name: value for name, value in row.items() if name != "worked"}
                compared.append({**shown, "predicted": predicted, "error": predicted / row["measured"] - 1})
    every_row = fit(known)
    return {
        "rows": compared,
        "skipped": skipped,
        "constants": {**constants, "all": {"attention": every_row.attention, "start": every_row.start}},
        "total": summary(compared),
        "by_model": {model: summary([row for row in compared if row["model"] == model]) for model in constants},
    }


def _timed_rows(rows: list[dict[str, str]], configs: Path | None) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    found, skipped = [], []
    for row in rows:
        try:
            found.append(timed(row, configs))
        except UserError as error:
            skipped.append({"model": row["model"], "reason": str(error)})
    return found, skipped


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the errors as fractions: mean of the sizes, the worst, and mean with sign."""
    errors = [row["error"] for row in rows]
    return {
        "mean": statistics.mean(map(abs, errors)),
        "worst": max(errors, key=abs),
        "signed": statistics.mean(errors),
    }


def print_tables(found: dict[str, Any]) -> None:
    """Print the figures for people."""
    print(f"{'run':<48}{'model (s)':>10}{'measured':>10}{'error':>9}")
    for row in found["rows"]:
        what = f"{row['model'].rsplit('/', 1)[-1]} {row['quant']} {row['attn']} {row['bs']} x {row['seq']}"
        print(f"{what:<48}{row['predicted']:>10.2f}{row['measured']:>10.2f}{row['error']:>+9.1%}")
    print(f"\n{'errors':<48}{'mean':>10}{'worst':>10}{'signed':>9}{'attention':>11}{'start':>10}")
    for name, errors in (*found["by_model"].items(), ("all", found["total"])):
        count = sum(name in ("all", row["model"]) for row in found["rows"])
        constants = found["constants"][name]
        fitted = f"{constants['attention']:>11.2f}{constants['start'] * 1e6:>7.0f} us"
        percent = f"{errors['mean']:>10.1%}{errors['worst']:>+10.1%}{errors['signed']:>+9.1%}"
        print(f"{name.rsplit('/', 1)[-1] + f' ({count} rows)':<48}{percent}{fitted}")
    for row in found["skipped"]:
        print(f"not predicted: {row['model']}: {row['reason']}")


def main(arguments: Sequence[str] | None = None) -> None:
    given = options(__doc__).parse_args(arguments)
    try:
        rows = read_rows(given.rows, "step_s")
        shared = rows if given.rows == ROWS or not ROWS.is_file() else read_rows(ROWS, "step_s")
        found = report(rows, given.configs, shared)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        print_tables(found)


if __name__ == "__main__":
    main()
