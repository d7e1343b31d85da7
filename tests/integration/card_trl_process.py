"""TRL's trainers on a card, in a process of their own: `python card_trl_process.py KIND|VCARD_FOLDER MODEL OUTPUT`."""

import json
import sys
import traceback
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cards import card_of, its_attention
from tiny_runs import tiny_recipe, write_jsonl

from lowmem_rlhf.engine import attention
from lowmem_rlhf.session.train import train

DEVICE = card_of(sys.argv[1])[1]
MODEL, OUTPUT = Path(sys.argv[2]), Path(sys.argv[3])
ROWS = [
    {"prompt": f"{a}+{b}= ", "chosen": f"{a + b}", "rejected": "abc"[: 1 + a % 3]} for a in range(3) for b in range(4)
]
CASES = [(name, "float32") for name in ("trl/dpo", "trl/kto", "trl/orpo")] + [("trl/dpo", "float16")]
attention.EXPLICIT_ON.clear()  # the CPU's runs take SDPA, as a card does


def run(algorithm: str, dtype: str, side: str, device: str) -> None:
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
    with its_attention(DEVICE):
        train(recipe, OUTPUT / f"{algorithm.replace('/', '-')}-{dtype}-{side}")


write_jsonl(OUTPUT / "rows.jsonl", ROWS)
failed: dict[str, str] = {}
for case in CASES:
    for side, device in {"cpu": "cpu", "card": DEVICE}.items():
        try:
            run(*case, side, device)
        except Exception:
            failed[f"{case}, {side}"] = traceback.format_exc()
(OUTPUT / "failed.json").write_text(json.dumps(failed))
