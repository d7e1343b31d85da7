"""Runs made without training: a model folder, an adapter whose change has a given size, and the run's files."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from tiny_runs import tiny_recipe

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.grouped_lora import dense_weight
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.plan import Plan, Settings
from lowmem_rlhf.run.directory import RunDirectory

CPU = torch.device("cpu")
SAMPLES = [
    "3+4=7, 5+6=11",
    "12 + 30 = 42, so it is.",
    "a b c d e f g h i j k",
    "What is 7 + 8? It is 15.",
    "9 - 2 = 7 and 9 - 3 = 6",
    "hello there, what a day",
]


def size_adapter(base: SharedBase, relative: float, seed: int = 0) -> None:
    """Fill the policy's adapter: each layer changes by ``relative`` of its weight's norm, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in base.adapter_layers():
            a, b = layer.masters("policy")
            for factor in (a, b):
                factor.copy_(torch.randn(factor.shape, generator=generator))
            weight = dense_weight(layer.base_layer, torch.float32).float()
            b.mul_(relative * weight.norm() / ((b @ a).norm() * layer.scaling["policy"]))
    base.adapters_changed()


def plan_of(quantization: str, compute_dtype: str) -> Plan:
    """Return the plan of a run on a CPU that loaded its base this way."""
    settings = Settings(
        quantization=quantization,
        compute_dtype=compute_dtype,
        gradient_checkpointing=False,
        offload_checkpoints=False,
        micro_batch_tokens=256,
        score_batch_tokens=256,
        rollout_batch_size=4,
        rollout_weights="quantized",
        logits_tile_tokens=64,
        optim="adamw",
        lora={"r": 4, "lora_alpha": 8.0, "target_modules": "all-linear"},
    )
    memory = {"budget_bytes": 8 << 30, "peak_bytes": 1 << 30, "phases": {}}
    device = Device("cpu", "CPU", 8 << 30, 8 << 30, None, bf16=True)
    return Plan(True, "yes", (1 << 30, 1 << 30), device, "cpu", settings, {}, memory)


def make_run(
    folder: Path,
    model: Path | str,
    relative: float = 0.01,
    quantization: str = "none",
    compute_dtype: str = "float32",
    samples: list[str] = SAMPLES,
    base: SharedBase | None = None,
    **changes: Any,
) -> RunDirectory:
    """Write a finished run whose adapter changes the weights by ``relative``."""
    recipe = tiny_recipe(model, **changes)
    run = RunDirectory.create(folder, recipe, plan_of(quantization, compute_dtype).to_dict(), resume=False)
    if base is None:
        base = SharedBase.load(str(model), CPU, quantization, compute_dtype, r=4, lora_alpha=8)
    size_adapter(base, relative)
    with run.new_adapter() as target:
        base.save_adapter(target)
    run.log_samples(1, [{"prompt": text[:2], "completion": text[2:]} for text in samples])
    return run


def shard(folder: Path, target: Path, count: int = 3) -> Path:
    """Write a model folder's weights into several files with an index."""
    from lowmem_rlhf.export.shards import write_index

    tensors = load_file(folder / "model.safetensors")
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    names = list(tensors)
    files = {f"model-{i + 1:05d}-of-{count:05d}.safetensors": names[i::count] for i in range(count)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, target / file, metadata={"format": "pt"})
    write_index(target, files, sum(t.nbytes for t in tensors.values()))
    return target


def change_tensors(folder: Path, change: Any) -> None:
    """Replace a single-file folder's tensors by what ``change`` makes of them."""
    file = folder / "model.safetensors"
    changed = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})


def save_model(family: str, folder: Path, **changes: Any) -> Path:
    """Write a tiny model of a family; GPT-2's sizes have names of their own."""
    own = {"n_embd": 64, "n_inner": 128} if family == "gpt2" else {}
    return save_tiny(family, folder, **own, **changes)
