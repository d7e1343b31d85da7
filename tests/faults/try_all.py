"""Every fault, by force: `python try_all.py [memory|stops]` (`make faults`).

Out-of-memory errors on the virtual card at every line of the package that allocates, at random allocations and as
lasting shortages, for GRPO (also NF4, float16, a classifier as the reward, and models with delta rules, with experts in
host memory and of Gemma 4's kind in float16), PPO with all roles, SFT and TRL's DPO;
runs killed at random moments and at file operations, and stopped by signals, for GRPO, PPO and SFT. results/ holds what
came of it; the exit code is 1 where a fault was not survived as it must be.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VCARD = ROOT.parent / "shared" / "vcard"
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent))

MEMORY = {  # GRPO and PPO at each of their lines, the others at those that these have not
    "grpo": ["sites=1000", "random=25", "shortages=6"],
    "ppo": ["sites=1000", "random=25", "shortages=6"],
    "nf4": ["sites=1000", "random=25"],
    "fp16": ["sites=1000", "random=25"],
    "learned": ["sites=1000", "random=25"],
    "sft": ["sites=1000", "random=25", "shortages=6"],
    "dpo": ["sites=1000", "random=25", "shortages=6"],
    "recurrent": ["sites=1000", "random=25", "shortages=6"],
    "experts": ["sites=1000", "random=25", "shortages=6"],
    "wide": ["sites=1000", "random=25"],
}
ALL_LINES = ("grpo", "ppo")
STOPS = {
    "grpo": ["kills=14", "operations=20", "signals=30", "others=1"],
    "ppo": ["kills=13", "operations=20", "signals=30"],
    "sft": ["kills=13", "operations=20"],
}
ALIKE = 1e-5


def run(script: str, *arguments: str, made: Path) -> dict[str, Any]:
    """Run a script of this folder in a process of its own; return what it wrote."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    settings = {"PATH": path, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env={**os.environ, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.is_file(), done.stderr[-3000:]
    return json.loads(made.read_text())


def of_memory(folder: Path, model: Path, case: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return what came of a case's memory faults; ``found`` is what came of the cases before."""
    made, but = folder / f"{case}.json", folder / f"{case}.but"
    folder.mkdir(parents=True, exist_ok=True)
    tried = [] if case in ALL_LINES else [line for one in found.values() for line in one["lines"]]
    but.write_text("\n".join(tried))
    facts = run("memory_process.py", str(VCARD), str(model), str(folder), case, *MEMORY[case], f"but={but}", made=made)
    kinds = {"random": "random", "shortage": "shortages"}
    rows = [{**row, "kind": kinds.get(row["site"], "sites")} for row in facts["faults"]]
    bad = [row for row in rows if not survived(row)]
    return {
        "allocations": facts["allocations"],
        "tried": dict(Counter(row["kind"] for row in rows)),
        "survived": sum(row["code"] == 0 for row in rows),
        "ended_with_a_sentence_and_resumed": sum(row["code"] == 1 and row.get("resumed") == 0 for row in rows),
        "largest_difference": max((row["distance"] for row in rows if "distance" in row), default=None),
        "lines": sorted(row["site"] for row in rows if row["kind"] == "sites"),
        "not_as_it_must_be": bad,
    }


def survived(row: dict[str, Any]) -> bool:
    """Whether a fault did what it may: nothing, or for a shortage a sentence from which a resume goes on."""
    ended = row["kind"] == "shortages" and row["code"] == 1 and row.get("resumed") == 0
    return (row["code"] == 0 or ended) and row.get("distance", 1.0) <= ALIKE


def of_stops(folder: Path, model: Path, case: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return what came of a case's stops."""
    facts = run("stops_process.py", str(model), str(folder), case, *STOPS[case], made=folder / f"{case}.json")
    rows = [row for row in facts["stops"] if "sha256" in row]
    bad = [row for row in rows if not resumed(row, facts)]
    return {
        "sha256": facts["sha256"],
        "file_operations_of_a_run": facts["operations"],
        "tried": dict(Counter(row["kind"] for row in rows)),
        "resumed_bit_for_bit": sum(row["sha256"] == facts["sha256"] for row in rows),
        "steps_finished_when_stopped": dict(Counter(row["finished"] for row in rows if "finished" in row)),
        "others": {row["kind"]: row["code"] for row in facts["stops"] if "sha256" not in row},
        "not_as_it_must_be": bad,
    }


def resumed(row: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether a stopped run was resumed bit for bit, and a signal lost no finished step and told the truth."""
    told = row["kind"] != "signal" or (
        row["right_code"] and not row["lost"] and row["kept"] == row["finished"] and row["said"] in (None, row["kept"])
    )
    whole = row["steps"] == list(range(1, facts["steps"] + 1)) and row["checkpoints"] == 1
    return row["resumed"] == 0 and row["sha256"] == facts["sha256"] and whole and told


def main() -> None:
    from tiny_runs import save_tiny_model

    asked = sys.argv[1:] or ["memory", "stops"]
    if "memory" in asked and not (VCARD / "vcard.py").is_file():
        print(f"memory  left out: the virtual card is not here ({VCARD})")
        asked.remove("memory")
    RESULTS.mkdir(exist_ok=True)
    bad, kinds = 0, {"memory": (MEMORY, of_memory), "stops": (STOPS, of_stops)}
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder) / "model")
        for kind in asked:
            cases, of = kinds[kind]
            results: dict[str, Any] = {}
            for case in cases:
                found = results[case] = of(Path(folder) / kind, model, case, results)
                wrong = len(found["not_as_it_must_be"])
                bad += wrong
                print(f"{kind:7} {case:8} {found['tried']}, not as it must be: {wrong}", flush=True)
                (RESULTS / f"{kind}.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
