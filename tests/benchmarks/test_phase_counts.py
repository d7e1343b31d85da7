"""benchmarks/phase_counts.py: kernels, FLOPs and bytes of our phases against what the plan says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VCARD = ROOT.parent / "shared" / "vcard"


@pytest.mark.skipif(not (VCARD / "vcard.py").is_file(), reason=f"the virtual card is not here ({VCARD})")
def test_the_plan_counts_what_the_engine_does():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja compiles the card
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "phase_counts.py"),
        "--card",
        str(VCARD),
        "--every",
        "2",
        "--json",
    ]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found["rows"]) == 6
    for row in found["rows"]:
        for work in ("score", "update", "decode"):
            for measure in ("kernels", "flops", "bytes"):
                one = row[work][measure]
                assert one["counted"] > 0 and abs(one["error"]) < 0.02, (row["case"], work, measure, one)
