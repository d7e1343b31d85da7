"""benchmarks/launches.py: kernels of a layer and outside, ours beside stock transformers with peft."""

import json
import os
import subprocess
import sys
from pathlib import Path

import launches
import pytest
from torch.utils.cpp_extension import get_default_build_root

ROOT = Path(__file__).resolve().parents[2]
VCARD = ROOT.parent / "shared" / "vcard"


@pytest.mark.skipif(not (VCARD / "vcard.py").is_file(), reason=f"the virtual card is not here ({VCARD})")
def test_kernels_are_counted_by_work_side_and_place():
    left = Path(get_default_build_root(), "lowmem_rlhf", "vcard_ext", "lock")
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()  # as a process that was killed while it compiled the card leaves it
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja compiles the card
    command = [sys.executable, str(ROOT / "benchmarks" / "launches.py"), "--card", str(VCARD), "--json"]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["device"], found["rows"]) == ("vcard:0", 4)
    for work in ("decode", "score", "update"):
        for side in launches.SIDES:
            assert found[work][side]["per_layer"] > 10 and found[work][side]["outside"] > 5, (work, side)
    ours, stock = found["decode"]["ours"], found["decode"]["stock"]
    assert ours["per_layer"] <= 24 and ours["outside"] <= 15 and 3 * ours["per_layer"] < stock["per_layer"]
    assert found["score"]["ours"]["per_layer"] <= 44 and found["update"]["ours"]["per_layer"] <= 239


def test_the_kernels_of_a_layer_are_those_of_the_layers_that_one_model_has_more():
    assert launches.split({"decode": 150}, {"decode": 250}) == {"decode": {"per_layer": 50, "outside": 50}}


def test_a_card_that_is_not_there_gets_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"--card: .* holds no vcard.py; give its folder, or cuda for a real card"):
        launches.card(str(tmp_path))
    with pytest.raises(SystemExit, match="--rows: got 0; at least one"):
        launches.main(["--rows", "0"])
