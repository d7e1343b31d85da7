"""Parts of ``bench`` on a card: `python card_bench_process.py KIND|VCARD_FOLDER MODEL OUTPUT`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cards import card_of, its_attention

from lowmem_rlhf.bench.part import run_task
from lowmem_rlhf.bench.run import BenchOptions, run_bench
from lowmem_rlhf.bench.work import Sizes
from lowmem_rlhf.errors import RunError

MODEL, OUTPUT = sys.argv[2], Path(sys.argv[3])
CARD, DEVICE = card_of(sys.argv[1])
SIZES = Sizes("none", 2, 2, 6, 1, 512, 16, True, (1, 3), 12, 2, 24, 8)


def here(name, work, seconds, tick):
    """Run a task in this process, which knows the card."""
    if name == "step.trl":
        raise RunError("not tried here")
    with its_attention(DEVICE):
        return run_task(name, work, lambda done, total: tick(done / total))


run_bench(BenchOptions(60, DEVICE, MODEL, OUTPUT / "record.json", "graphs,step,plan,device_tests", SIZES), here)
(OUTPUT / "done").write_text(json.dumps({"live": CARD.live()}))
