"""Hold the memory model against a CUDA card: steps of real model sizes under another, smaller card's limit.

    python benchmarks/vram_card.py [--profile rtx-2080-ti] [--models ID ...] [--algorithms grpo ...] [--json]

For each model of the catalogue, random weights of its exact sizes are written to disk; the run is planned for the
profile's card and takes two steps of its own trainer at the longest prompts and completions on the card that is here.
The process can reserve no more than the profile's card would have free, computes in its dtypes, and attention takes
only kernels that a card before sm_80 has as well. Compared are each phase's peak of allocated bytes with that of the
plan's live tensors, and what the process reserved at most with the plan's peak. Errors are predicted over measured,
less one. Cases run in processes of their own, ``--processes`` at once; nothing is timed.
"""

import argparse
import json
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vram_measured import compare, machine

MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct")
MB = 10**6


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--profile", default="rtx-2080-ti", help="the card whose memory and dtypes are taken")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="ID", help="of the catalogue")
    parser.add_argument("--algorithms", nargs="+", default=("grpo",), choices=("sft", "grpo", "ppo"))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="cases at once")
    parser.add_argument("--set", nargs="*", default=(), metavar="KEY=VALUE", help="further values of the recipe")
    parser.add_argument("--json", action="store_true")
    return parser


class CardCounter:
    """The caching allocator's own counts, as a counter.

    Attributes:
        reserved: bytes that the process reserved at most, up to the last reading.
    """

    reserved = 0

    def __enter__(self) -> "CardCounter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.reset_peak()

    def reset_peak(self) -> None:
        """Begin a new peak at what is allocated now."""
        import torch

        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> int:
        """Bytes allocated at most since then."""
        import torch

        return torch.cuda.max_memory_allocated()


def write_model(name: str, folder: Path) -> Path:
    """Write random float16 weights of a catalogue model's sizes, and a tokenizer of bytes, into ``folder``."""
    import torch
    from model_folders import byte_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem_rlhf.architecture.catalogue import entries

    fields = dict(entries()[name].config)
    fields.pop("torch_dtype", None)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(fields.pop("model_type"), **{**fields, **ids})
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="4GB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(given: argparse.Namespace, model: Path, algorithm: str) -> Any:
    """Return the recipe of a case."""
    from lowmem_rlhf.recipe.loading import load_recipe

    values = {
        "model": model,
        "algorithm": algorithm,
        "data.eval_size": 0,
        "data.chat": "false",
        "data.system": "null",
        "data.max_prompt_length": given.prompt,
        "generation.max_completion_length": given.length,
        "sft.max_length": given.prompt + given.length,
        "hardware.device": "cuda",
        "hardware.profile": given.profile,
    }
    if algorithm == "sft":
        values |= {"rewards": "[]", "data.answer": "null", "data.completion": "completion"}
    return load_recipe("grpo_gsm8k", [*(f"{key}={value}" for key, value in values.items()), *given.set])


def measure(given: argparse.Namespace, name: str, algorithm: str) -> dict[str, Any]:
    """Take the steps of a case under the profile's limit; return predicted and measured bytes, or what went wrong."""
    import torch

    from lowmem_rlhf.bench.trainer_step import Measured
    from lowmem_rlhf.hardware.capabilities import CUDA_CONTEXT_BYTES
    from lowmem_rlhf.planning.run_plan import running_plan
    from lowmem_rlhf.quiet import hush

    hush()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    case = {"model": name, "algorithm": algorithm}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(name, Path(scratch) / "model")
        torch.cuda.empty_cache()
        recipe = recipe_of(given, folder, algorithm)
        plan = running_plan(recipe)
        case |= {"settings": plan.to_dict()["settings"], "budget": plan.memory["budget_bytes"]}
        limit = plan.device.free_bytes - CUDA_CONTEXT_BYTES
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        torch.cuda.reset_peak_memory_stats()
        try:
            measured = Measured(recipe, plan, CardCounter, others=0)
        except Exception:
            return case | {"failed": traceback.format_exc()}
    live = {
        phase: {part: size for part, size in components.items() if part != "allocator"}
        for phase, components in plan.memory["phases"].items()
    }
    peak, reserved = plan.memory["peak_bytes"], measured.counter.reserved
    return case | {
        "phases": compare(live, measured.peaks),
        "reserved": {"predicted": peak, "measured": reserved, "error": peak / reserved - 1},
        "said": measured.said,
    }


def print_table(found: dict[str, Any]) -> None:
    """Print the figures for people, in MB."""
    print(f"{'case':<42}{'phase':>10}{'model':>10}{'measured':>10}{'error':>9}")
    for row in found["rows"]:
        name = f"{row['model'].rpartition('/')[2]}, {row['algorithm']}, {row['settings']['quantization']}"
        if "failed" in row:
            print(f"{name:<42}failed: {row['failed'].strip().splitlines()[-1]}")
            continue
        for phase, figures in (*row["phases"].items(), ("reserved", row["reserved"])):
            both = f"{figures['predicted'] / MB:>10.1f}{figures['measured'] / MB:>10.1f}"
            print(f"{name:<42}{phase:>10}{both}{figures['error']:>+9.2%}")
        if row["said"].strip():
            print(row["said"].strip())


def main(arguments: Sequence[str] | None = None) -> None:
    given = options().parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA card here; vram_measured.py runs on a CPU")
    chosen = [(name, algorithm) for name in given.models for algorithm in given.algorithms]
    with get_context("spawn").Pool(given.processes, maxtasksperchild=1) as pool:
        rows = pool.starmap(measure, [(given, *case) for case in chosen], chunksize=1)
    card = torch.cuda.get_device_properties(0)
    found = {"card": f"{card.name}, sm_{card.major}{card.minor}", "machine": machine(), "rows": rows}
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        print_table(found)


if __name__ == "__main__":
    main()
