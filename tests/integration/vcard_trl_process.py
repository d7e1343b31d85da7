"""TRL's trainers on the virtual card, in a process of their own: `python vcard_trl_process.py VCARD MODEL OUTPUT`."""

import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, sys.argv[1])
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import vcard  # noqa: F401 (registers the device)
from tiny_runs import tiny_recipe, write_jsonl
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem_rlhf.model import attention
from lowmem_rlhf.session import train

MODEL, OUTPUT = Path(sys.argv[2]), Path(sys.argv[3])
ROWS = [
    {"prompt": f"{a}+{b}= ", "chosen": f"{a + b}", "rejected": "abc"[: 1 + a % 3]} for a in range(3) for b in range(4)
]
CASES = [(name, "float32") for name in ("trl/dpo", "trl/kto", "trl/orpo")] + [("trl/dpo", "float16")]
attention.EXPLICIT_ON.clear()  # the CPU's runs take SDPA, as a card does


def run(algorithm: str, dtype: str, device: str) -> None:
    data = {"train": str(OUTPUT / "rows.jsonl"), "prompt": "prompt", "template": None, "answer": None, "eval_size": 4}
    recipe = tiny_recipe(
        MODEL,
        algorithm=algorithm,
        hardware={"device": device, "compute_dtype": dtype},
        data={**data, "train_size": None},
        rewards=[],
        grpo={},
        trl={"max_length": 40},
    )
    with sdpa_kernel(SDPBackend.MATH):  # the card's SDPA only has the math kernel
        train(recipe, OUTPUT / f"{algorithm.replace('/', '-')}-{dtype}-{device}")


write_jsonl(OUTPUT / "rows.jsonl", ROWS)
failed: dict[str, str] = {}
for case in CASES:
    for device in ("cpu", "vcard"):
        try:
            run(*case, device)
        except Exception:
            failed[f"{case}, {device}"] = traceback.format_exc()
(OUTPUT / "failed.json").write_text(json.dumps(failed))
