"""Whole runs of a tiny model by the command line: plan, GRPO and SFT of two steps, the merge and the GGUF of them.

Each command runs in this process. It ends with what it did, or with its own sentence; anything else is a traceback.
"""

import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import RunError

COMMON: dict[str, Any] = {
    "data": {
        "train": "arithmetic",
        "eval_size": 0,
        "train_size": 8,
        "template": "{question}=",
        "max_prompt_length": 24,
    },
    "generation": {"num_generations": 3, "max_completion_length": 10},
    "rewards": [{"function": f"{__file__}:spread"}],
    "lora": {"r": 4, "lora_alpha": 8},
    "training": {
        "max_steps": 2,
        "prompts_per_step": 3,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "save_steps": 100,
        "log_completions": 4,
    },
}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"hardware": {"device": "cpu", "quantization": "nf4", "compute_dtype": "bfloat16"}},
    "sft": {
        "algorithm": "sft",
        "sft": {"max_length": 48},
        "hardware": {"device": "cpu", "quantization": "none", "compute_dtype": "bfloat16"},
        "rewards": [],
    },
}


def spread(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Reward completions with numbers that are hardly ever equal: untrained models have no better ones."""
    return [sum((place + 1) * token for place, token in enumerate(ids)) % 97 / 97 for ids in completion_ids]


def command(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit code and what it printed on both streams."""
    from lowmem_rlhf import cli

    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["lowmem-rlhf", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def sentence(text: str) -> str:
    """Return the error message in what a command printed, on one line."""
    return " ".join(text.rsplit("error:", 1)[-1].split())


def write_recipe(path: Path, name: str, model: Path, targets: list[str] | None) -> Path:
    """Write the recipe of a run; JSON is YAML."""
    values = {"name": "tiny", "model": str(model), **COMMON, **RUNS[name]}
    if targets:
        values["lora"] = {**COMMON["lora"], "target_modules": targets}
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def plan(recipe: Path, folder: Path, found: dict[str, Any]) -> None:
    """Find whether the planner takes a recipe, what it says, and its count of parameters as a multiple of the model's.

    Raises:
        RunError: it does not; the message is its sentence.
    """
    from safetensors import safe_open

    from lowmem_rlhf.architecture.lookup import model_dimensions

    planned = json.loads(_done("plan", recipe, "--json"))
    found |= {"says": planned.get("verdict", "yes" if planned["fits"] else "no")}
    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no dict)
    found["parameters"] = model_dimensions(str(folder)).num_parameters / stored


def train(recipe: Path, run: Path, found: dict[str, Any]) -> None:
    """Train two steps; find the largest difference of log-probs that the run itself saw while sampling.

    Raises:
        RunError: the command ended with a sentence, which is the message.
    """
    _done("train", recipe, "--output", run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seen = [row["sampling/logp_difference"] for row in rows if "sampling/logp_difference" in row]
    found |= {"steps": len(rows), **({"logp_difference": max(seen)} if seen else {})}


def merge(run: Path, folder: Path, found: dict[str, Any]) -> None:
    """Merge a run on unquantized weights in fp32; find how far the result is from the adapter in stock peft.

    Raises:
        RunError: the command ended with a sentence, which is the message.
    """
    import torch
    from architecture_checks import with_adapter
    from architecture_measures import largest, load_stock, ragged, stock_alone

    made = json.loads(_done("export", run, "--dtype", "float32", "--device", "cpu", "--json"))
    found["mean_kl"] = made["proof"]["mean_kl"]
    groups = ragged()
    with torch.no_grad():
        want = stock_alone(with_adapter(load_stock(folder, "none", "float32"), run / "adapter"), groups)
        found["logps"] = largest(stock_alone(load_stock(Path(made["folder"]), "none", "float32"), groups), want)


def gguf(run: Path, found: dict[str, Any]) -> None:
    """Export a run as a GGUF in 16 bits; find what the export says of it after reading it again.

    Raises:
        RunError: the command ended with a sentence, which is the message.
    """
    made = json.loads(_done("export", run, "--format", "gguf", "--quantize", "f16", "--device", "cpu", "--json"))
    found |= {key: made["proof"][key] for key in ("mean_kl", "top1_agreement") if key in made.get("proof", {})}


def _done(*arguments: object) -> str:
    """Return what a command printed.

    Raises:
        RunError: it ended with a sentence, which is the message.
    """
    code, out, err = command(*arguments)
    if code:
        raise RunError(sentence(err))
    return out
