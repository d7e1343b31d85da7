"""Every model type of AutoModelForCausalLM, as a tiny model: is what it computes here what it computes in transformers?

    python benchmarks/architectures.py [TYPE ...] [--quick] [--fresh] [--workers N] [--write docs/models.md] [--json]

Each type has a process of its own, so that one that crashes or hangs ends alone. Its tiny model (`tiny_architectures`)
is loaded in fp32, bfloat16 and NF4; log-probs, the adapter's gradients and the log-probs of sampled tokens are held
against stock transformers with stock peft; then the command line plans it, trains two steps by GRPO (NF4) and by SFT
(bfloat16), merges and writes a GGUF. Rows are kept in a file: a second call goes on where the first one ended, as long
as neither the package nor transformers has changed.

--quick leaves out NF4 and the runs, keeps nothing and works in this process; without TYPE it takes the families of the
catalogue. The verdict of a type:
    packed, padded   every number is within its bound; how its rows are laid out
    refused          the package says no, in the sentence beside it
    wrong            a number is beyond its bound
    traceback        something else than a sentence came out
    stock_fails      stock transformers cannot run it, or differs from itself
    not_built        no tiny model could be made
The exit code is 1 where a row is wrong or a traceback.
"""

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

SECONDS = 600  # a type may take, on a busy machine

Row = dict[str, Any]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: all, and with --quick the catalogue's")
    parser.add_argument("--quick", action="store_true", help="log-probs and gradients in fp32 and bfloat16 only")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are kept")
    parser.add_argument("--state", type=Path, default=Path("runs/architectures.jsonl"), help="the file of kept rows")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="types at once")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table of all types there, as Markdown")
    parser.add_argument("--json", action="store_true")
    return parser


def chosen(given: argparse.Namespace) -> list[str]:
    """Return the types to look at.

    Raises:
        SystemExit: one is not known.
    """
    from tiny_architectures import model_types

    known = model_types()
    if unknown := sorted(set(given.types) - set(known)):
        raise SystemExit(f"not a type of AutoModelForCausalLM: {', '.join(unknown)}")
    if given.types or not given.quick:
        return given.types or known
    from lowmem_rlhf.architecture.families import types_with_terms

    return [name for name in types_with_terms() if name in known]


def code() -> str:
    """Return a digest of what rows depend on: the package, this benchmark, and the versions of the libraries."""
    from architecture_workers import HERE, PACKAGE

    digest = hashlib.sha256()
    own = [path for path in HERE.glob("*.py") if "architecture" in path.name or path.name == "tiny_fields.py"]
    for path in [*sorted(PACKAGE.rglob("*.py")), *sorted(own)]:
        digest.update(path.read_bytes())
    for library in ("torch", "transformers", "peft", "bitsandbytes"):
        digest.update(version(library).encode())
    return digest.hexdigest()[:12]


def kept_rows(path: Path, digest: str) -> dict[str, Row]:
    """Return the rows of a file that this code made, by type."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["type"]: row for row in rows if row["code"] == digest}


def quiet() -> None:
    """Keep the libraries' lines out of sight, and to one thread: tiny models gain nothing from more."""
    import torch
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def quick_rows(names: list[str]) -> Iterator[Row]:
    """Yield the rows of types in their quick form, in this process."""
    from architecture_rows import row_of

    quiet()
    for name in names:
        yield row_of(name, quick=True)


def whole_rows(names: list[str], given: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of types, those that are kept first, and keep the others as they come."""
    from architecture_workers import rows_by_process

    digest = code()
    if given.fresh:
        given.state.unlink(missing_ok=True)
    kept = kept_rows(given.state, digest)
    yield from (kept[name] for name in names if name in kept)
    missing = [name for name in names if name not in kept]
    given.state.parent.mkdir(parents=True, exist_ok=True)
    for row in rows_by_process(missing, given.workers, SECONDS):
        with given.state.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "code": digest}) + "\n")
        yield row


def main() -> None:
    given = options().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from architecture_table import BAD, line, page

    names = chosen(given)
    rows: dict[str, Row] = {}
    for row in quick_rows(names) if given.quick else whole_rows(names, given):
        rows[row["type"]] = row
        print(f"{len(rows)}/{len(names)} {line(row)}", file=sys.stderr, flush=True)
    found = [rows[name] for name in sorted(rows)]
    counts = Counter(row["verdict"] for row in found)
    if given.write:
        given.write.write_text(page(found), encoding="utf-8")
    if given.json:
        print(json.dumps({"transformers": version("transformers"), "counts": counts, "types": found}, indent=2))
    else:
        print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    sys.exit(int(any(counts[verdict] for verdict in BAD)))


if __name__ == "__main__":
    main()
