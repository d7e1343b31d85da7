"""Write the tables of docs/measured.md that come from records: what `lowmem-rlhf bench` left, and rows that are quoted.

    python benchmarks/measured.py [--check]

Records lie in benchmarks/records. Those of `bench` are kept as they are; a ``quoted`` one is written by hand and holds
rows of ``what``, ``result`` and ``command``. Each table stands between two comments, the text around them is written by
hand. With ``--check`` nothing is written, and it is an error where a table is not that of the records.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS, PAGE = ROOT / "benchmarks" / "records", ROOT / "docs" / "measured.md"
MIB, GIB = 2**20, 2**30
GROUPS = ("gpu", "cpu")
STEP, PHASES = ("rollout", "score", "update", "step"), ("rollout", "scoring", "update", "step")  # as recorded, as read
NONE = {"gpu": "No card has been measured so yet; `lowmem-rlhf bench` on yours makes the first record.", "cpu": ""}

Record = dict[str, Any]


def read_records(folder: Path = RECORDS) -> list[Record]:
    """Return all records, the oldest first.

    Raises:
        SystemExit: a file is no record.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("schema") != 1 or record.get("kind") not in ("bench", "quoted"):
            raise SystemExit(f"{path.name} is no record of schema 1; keep what `lowmem-rlhf bench` wrote as it is")
        found.append(record)
    return sorted(found, key=lambda record: record.get("date", ""))


def group_of(record: Record) -> str:
    """Return whether a record is of a ``gpu`` or a ``cpu``."""
    return record["group"] if record["kind"] == "quoted" else "cpu" if record["device"]["source"] == "cpu" else "gpu"


def sections(records: Sequence[Record]) -> dict[str, str]:
    """Return the generated text by the name of its place on the page."""
    found = {}
    for group in GROUPS:
        own = [record for record in records if group_of(record) == group]
        quoted = [row for record in own if record["kind"] == "quoted" for row in record["rows"]]
        found[f"quoted-{group}"] = _quoted(quoted, group)
        found[f"bench-{group}"] = by_records([record for record in own if record["kind"] == "bench"]) or NONE[group]
    return found


def _quoted(rows: Iterable[dict[str, str]], group: str) -> str:
    last = "command" if group == "gpu" else "command, commit"
    return table(["what", "result", last], [[row["what"], row["result"], row["command"]] for row in rows])


def by_records(records: Sequence[Record]) -> str:
    """Return the tables of records that `bench` has written; those that no record has figures for are left out."""
    made = [make(records) for make in (_machines, _graphs, _step, _plan, _precisions, _tests, _left_out)]
    return "\n\n".join(text for text in made if text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, empty without rows."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines]) if lines else ""


def _titled(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = table(columns, rows)
    return f"{title}\n\n{text}" if text else ""


def _name(record: Record) -> str:
    return f"{record['device']['name'].removeprefix('NVIDIA ')}, {record['date'][:10]}"


def _machines(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        device, versions, model = record["device"], record["versions"], record["model"]
        kept = ("torch", "cuda", "bitsandbytes", "transformers", "trl", "peft")
        libraries = ", ".join(f"{name} {versions[name]}" for name in kept if versions.get(name))
        facts = [f"{device['total_bytes'] / GIB:.1f} GiB", f"driver {device['driver']}" if device["driver"] else ""]
        facts += [f"{device['cores']} cores, load {device['load']} before"] if device["source"] == "cpu" else []
        work = " x ".join(str(record["work"][key]) for key in ("prompts", "generations", "completion_length"))
        weights = f"{model['name'].rpartition('/')[2]}, {model['weights']} weights, {model['compute_dtype']}"
        rows.append(
            [
                _name(record),
                ", ".join(filter(None, facts)),
                weights,
                work,
                libraries,
                record["commit"] or record["package"],
            ]
        )
    return table(["record", "memory", "model", "step", "versions", "commit"], rows)


def _values(records: Sequence[Record], part: str) -> Iterable[tuple[str, dict[str, Any]]]:
    for record in records:
        if values := record["parts"].get(part, {}).get("values"):
            yield _name(record), values


def _graphs(records: Sequence[Record]) -> str:
    rows = []
    for name, values in _values(records, "graphs"):
        for count, found in values["rows"].items():
            speed, ratio = found["tokens_per_second"], found.get("ratio")
            with_graphs = f"{speed['graphs']:,.0f}" if speed["graphs"] else "-"
            times = f"{ratio['without_graphs']:.2f}" if ratio else "-"
            others = [f"{speed[way]:,.0f}" for way in ("without_graphs", "waves")]
            rows.append([name, count, with_graphs, *others, times])
    columns = ["record", "completions at once", "with graphs", "without", "waves", "with / without"]
    return _titled("Decoded tokens a second, 16-bit weights (float32 on a CPU without bfloat16):", columns, rows)


def _step(records: Sequence[Record]) -> str:
    rows = []
    for name, values in _values(records, "step"):
        if ratio := values.get("ratio"):
            phases = [f"{ratio['seconds'][phase]:.2f}" for phase in STEP]
            sides = [values[side]["seconds"]["step"] for side in ("ours", "trl")]
            peaks = [values[side]["peak_bytes"]["step"] for side in ("ours", "trl")]
            seconds, peak = " / ".join(f"{one:.1f} s" for one in sides), " / ".join(map(_bytes, peaks))
            rows.append([name, seconds, *phases, peak, f"{ratio['peak_bytes']['step']:.3f}"])
    columns = ["record", "seconds", *PHASES, "peak", "peak, ratio"]
    return _titled(
        "A GRPO step with NF4 weights, ours / TRL on the same work (seconds, their ratios by phase):", columns, rows
    )


def _plan(records: Sequence[Record]) -> str:
    rows = []
    for name, values in _values(records, "plan"):
        memory = [_ratio(values["memory"], phase, 3) for phase in STEP]
        time = [_ratio(values.get("time") or {}, phase, 2) for phase in STEP]
        rows.append([name, values["settings"]["quantization"], *memory, _ratio(values, "reserved", 3), *time])
    times = (f"time {phase}" for phase in PHASES)
    columns = ["record", "weights", *PHASES, "reserved", *times]
    return _titled("A step as it is planned, measured / predicted (bytes, then seconds):", columns, rows)


def _ratio(values: dict[str, Any], key: str, digits: int) -> str:
    found = (values.get(key) or {}).get("ratio")
    return f"{found:.{digits}f}" if found else "-"


def _precisions(records: Sequence[Record]) -> str:
    rows = []
    for name, values in _values(records, "precisions"):
        for precision, found in values.items():
            weights = found["compute_dtype"] if precision == "none" else precision
            seconds = [f"{found['seconds'][phase]:.2f} s" for phase in STEP]
            rows.append([name, weights, *seconds, _bytes(found["peak_bytes"]["step"])])
    return _titled("The same step by the weights' precision:", ["record", "weights", *PHASES, "peak"], rows)


def _tests(records: Sequence[Record]) -> str:
    rows = []
    for name, values in _values(records, "device_tests"):
        finished = "all" if values["finished"] else "those that the time sufficed for"
        rows.append([name, *(str(values[key]) for key in ("passed", "failed", "skipped")), finished])
    return _titled("The device tests:", ["record", "passed", "failed", "skipped", "of"], rows)


def _left_out(records: Sequence[Record]) -> str:
    rows = [
        [_name(record), part["title"], part["status"], part["reason"].replace("|", "/")]
        for record in records
        for part in record["parts"].values()
        if part["status"] != "done"
    ]
    return _titled("What they lack:", ["record", "part", "", "why"], rows)


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def filled(page: str, texts: dict[str, str]) -> str:
    """Return the page with the text of every place put between its two comments.

    Raises:
        SystemExit: a place is not on the page, or has no end.
    """
    for name, text in texts.items():
        place = re.compile(rf"(<!-- begin {name}:[^>]*-->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not place.search(page):
            raise SystemExit(f"docs/measured.md has no place `<!-- begin {name}: ... -->` to `<!-- end {name} -->`")
        page = place.sub(_between(text), page)
    return page


def _between(text: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{text}{chr(10) if text else ''}{found[2]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is not the records'")
    given = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    wanted = filled(page, sections(read_records()))
    if given.check and page != wanted:
        raise SystemExit("docs/measured.md is not what the records say; run `python benchmarks/measured.py`")
    if not given.check:
        PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
