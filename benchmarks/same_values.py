"""What two runs and two sets of plans differ in, bit by bit.

What measures the machine does not count, nor what the new side says beyond the old one: a metric or a part of a plan.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURED = ("time/", "memory/", "gpu/")  # metrics of the machine
LISTS = ("metrics", "samples")  # the .jsonl files of a run


@dataclass(frozen=True)
class Compared:
    """How many values of the old side were compared, and where the new side first differs from them."""

    values: int
    difference: str = ""


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield every number and text of JSON values with its place, as text that is equal only for equal bits."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            if not key.startswith(MEASURED):
                yield from leaves(part, f"{where}.{key}" if where else key)
    elif isinstance(value, list) and value:
        for index, part in enumerate(value):
            yield from leaves(part, f"{where}[{index}]")
    elif where:  # a file that is not there has no values
        yield where, json.dumps(value)


def compare_values(old: Any, new: Any) -> Compared:
    """Compare JSON values; the order of keys does not count."""
    before, after = dict(leaves(old)), dict(leaves(new))
    known = {_row(where) for where in before}
    for where in (*before, *(one for one in after if _row(one) not in known)):
        if before.get(where) != after.get(where):
            return Compared(len(before), f"{where}: {_shown(before.get(where))} was, {_shown(after.get(where))} is")
    return Compared(len(before))


def _row(where: str) -> str:
    """Return the row of a log, the part of an evaluation or the plan that a place is in."""
    return where.partition(".")[0]


def _shown(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) <= 60 else f"{text[:57]}..."


def compare_tensors(old: Path, new: Path) -> Compared:
    """Compare the tensors of all .safetensors files of two run directories: adapter, checkpoints, optimizer, model."""
    files = sorted({path.relative_to(run).as_posix() for run in (old, new) for path in run.rglob("*.safetensors")})
    count, difference = 0, ""
    for file in files:
        before, after = _tensors(old / file), _tensors(new / file)
        count += sum(_elements(tensor) for tensor in before.values())
        difference = difference or _tensor_difference(file, before, after)
    return Compared(count, difference)


def _tensors(file: Path) -> dict[str, dict[str, Any]]:
    """Return shape, dtype and bytes of each tensor by its name, in the order of names."""
    from safetensors import deserialize

    return dict(sorted(deserialize(file.read_bytes()))) if file.is_file() else {}


def _elements(tensor: Mapping[str, Any]) -> int:
    count = 1
    for size in tensor["shape"]:
        count *= size
    return count


def _tensor_difference(file: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name), new.get(name)
        if before is None or after is None:
            return f"{file}: {name} is {'new' if before is None else 'gone'}"
        for key in ("dtype", "shape"):
            if before[key] != after[key]:
                return f"{file}: {name}: {key} {before[key]} was, {after[key]} is"
        if before["data"] != after["data"]:
            pairs = enumerate(zip(before["data"], after["data"], strict=True))
            byte = next(index for index, (left, right) in pairs if left != right)
            width = len(before["data"]) // _elements(before)
            return f"{file}: {name}: differs from element {byte // width} on"
    return ""


def compare_runs(old: Path, new: Path) -> dict[str, Compared]:
    """Compare what two run directories hold of what was computed: by part, the number of values and a difference."""
    found = {name: compare_values(_lines(old, name), _lines(new, name)) for name in LISTS}
    found["evaluation"] = compare_values(*(_json(run / "evaluation.json") for run in (old, new)))
    return {**found, "tensors": compare_tensors(old, new)}


def _lines(run: Path, name: str) -> dict[str, Any]:
    """Return the rows of a .jsonl file by number; empty of a run without it."""
    file = run / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {f"line {number}": json.loads(line) for number, line in enumerate(lines, 1)}


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def compare_plans(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[str, Compared]:
    """Compare what `plans_side` printed on both sides, by recipe.

    What a plan says on standard error does not count where it was made: it is no part of the plan.
    """
    before, after = _by_recipe(old), _by_recipe(new)
    recipes = dict.fromkeys((*before, *after))
    return {recipe: compare_values(before.get(recipe, {}), after.get(recipe, {})) for recipe in recipes}


def _by_recipe(plans: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for plan in plans:
        kept = {key: plan[key] for key in ("code", "out", *(("err",) if plan["code"] else ()))}
        found.setdefault(plan["recipe"], {})[plan["profile"]] = kept
    return found
