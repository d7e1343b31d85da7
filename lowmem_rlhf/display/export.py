"""What `export` shows: what it will take, and what came out with its proof. No torch here."""

from typing import Any

from rich.console import Console

from lowmem_rlhf.display.format import format_bytes, format_number, format_value, number
from lowmem_rlhf.display.tables import plain_table
from lowmem_rlhf.plain_text import harmless

PARTS = {
    "merge": "merging (host memory)",
    "live_policy": "live policy",
    "stock_policy": "the same in stock transformers and peft",
    "original_policy": "the adapter on the unquantized base (if there is room)",
    "loaded_again": "export, loaded again",
    "gguf_loaded_again": "GGUF, loaded again (host memory, if there is room)",
}
JUDGED = {
    "mean_kl": "mean KL",
    "top1_agreement": "same token",
    "largest_score_difference": "largest difference of a score",
}


def judged_rows(proof: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what was compared with what, how far apart they are, and the bound, as cells of a table."""
    rows = []
    for one in proof.get("judged") or ():
        measured, allowed = [], []
        for key, text in JUDGED.items():
            for end, word in (("_at_most", "at most"), ("_at_least", "at least")):
                if key + end in one:
                    measured.append(f"{text} {format_number(one.get(key))}")
                    allowed.append(f"{word} {format_number(one[key + end])}")
        rows.append((f"{one.get('what')} and {one.get('against')}", ", ".join(measured), ", ".join(allowed)))
    return rows


def show_plan(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print an export's memory and disk."""
    console = console or Console()
    rows = [
        (PARTS.get(part, part.replace("_", " ")), format_bytes(size)) for part, size in plan["memory_bytes"].items()
    ]
    console.print(plain_table(("memory, one after another", "bytes"), rows))
    needed, free = plan["disk_bytes"], plan["free_disk_bytes"]
    verdict = "fits" if needed <= free else "does not fit"
    what = " ".join(str(plan[key]) for key in ("format", "dtype") if plan[key])
    print(f"disk for {what}: {format_bytes(needed)}, {format_bytes(free)} free: {verdict}")


def show_result(facts: dict[str, Any], console: Console | None = None) -> None:
    """Print what is left of what was learned in an export, its dtype with the reason, its proof and its folder."""
    console = console or Console()
    if summary := facts.get("summary"):
        print(harmless(summary))
    if "dtype" in facts:
        print(harmless(f"{facts['dtype']}: {facts['dtype_reason']}"))
    for note in facts.get("notes") or ():
        print(harmless(str(note)))
    rows = [
        (key.replace("_", " "), format_number(v) if number(v) is not None else format_value(v))
        for key, v in facts["proof"].items()
        if key != "judged"
    ]
    console.print(plain_table(("compared with the live policy", ""), rows))
    if verdicts := judged_rows(facts["proof"]):
        console.print(plain_table(("held against each other", "", "allowed"), verdicts))
    print(f"export: {facts['folder']}")
    if facts.get("pushed"):
        print(f"pushed: {facts['pushed']}")
