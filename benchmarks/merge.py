"""Peak memory and time of our merge against peft's merge_and_unload and save_pretrained: the same model and adapter.

    python benchmarks/merge.py [--layers 22] [--hidden 2048] [--rank 16] [--dtype float16] [--json]

The model is a random Llama of TinyLlama's shape, in bfloat16, in shards of --shard-mb; the adapter is on all linear
layers, its change 1 % of the weights. Both sides write the merged model as --dtype, in shards, and their tensors are
compared. Each merge has a fresh process, which has imported its libraries before the clock starts. The peak is that of
the process's resident memory (VmHWM), libraries included; `memory beyond the libraries` is the peak less what was
resident before the work. The sides take turns; times are medians.

peft's side is what its documentation says: AutoModelForCausalLM.from_pretrained, PeftModel.from_pretrained,
merge_and_unload, save_pretrained, with the dtype of the result from the start. That reads bfloat16 shards as float16
into memory of its own; with --dtype bfloat16 they stay mapped, and its peak is lower. The base is not quantized, since
peft's merge into NF4 would lose the adapter (a test shows it). What is left out: the proof that `export` adds,
tokenizer and other small files.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from children import Channel, Child

SIDES = ("ours", "peft")
BOUNDS = {"peak": 0.3, "time": 1.5}  # of peft's


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of the merged weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where model and results go for the time being")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a child process
    return parser


def make_model(folder: Path, work: argparse.Namespace) -> int:
    """Write the model's shards one after another, and the adapter; return the bytes of the weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowmem_rlhf.export.shards import write_index, write_tensors

    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.hidden * 11 // 4,
        num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // 64,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    config.save_pretrained(folder / "model")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: list[list[str]] = [[]]
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    for name in shapes:
        if sum(sizes[one] for one in shards[-1]) + sizes[name] > work.shard_mb * 10**6 and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    generator = torch.Generator(device="cpu").manual_seed(0)
    files = {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}
    for file, names in files.items():
        layout = [(name, "BF16", shapes[name], sizes[name]) for name in names]
        write_tensors(folder / "model" / file, layout, (_random(shapes[name], 0.02, generator) for name in names))
    write_index(folder / "model", files, sum(sizes.values()))
    linears = {name: shape for name, shape in shapes.items() if ".layers." in name and len(shape) == 2}
    make_adapter(folder / "adapter", linears, work.rank, generator)
    return sum(sizes.values())


def _random(shape: tuple[int, ...], std: float, generator: Any) -> Any:
    import torch

    empty = torch.empty(shape, dtype=torch.float32, device="cpu")
    return empty.normal_(std=std, generator=generator).to(torch.bfloat16)


def make_adapter(folder: Path, linears: dict[str, tuple[int, ...]], rank: int, generator: Any) -> None:
    """Write an adapter in peft's format whose change is about 1 % of weights of standard deviation 0.02."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    state = {}
    for name, (outputs, inputs) in linears.items():
        for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight"
            std = (2e-4 / 2 / rank**0.5) ** 0.5  # the scaling is 2
            state[key] = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(std=std, generator=generator)
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    config.base_model_name_or_path = "model"
    config.save_pretrained(str(folder))


def ours(folder: Path, target: Path, dtype: str) -> None:
    """Merge as `export` does, without the proof."""
    import torch

    from lowmem_rlhf.architecture.adapters import saved_adapter
    from lowmem_rlhf.export.merging.lora_file import LoraFile
    from lowmem_rlhf.export.merging.merge import Merge
    from lowmem_rlhf.export.merging.names import skeleton
    from lowmem_rlhf.export.shards import read_shards
    from lowmem_rlhf.export.source import write_config

    model = folder / "model"
    adapter = LoraFile(saved_adapter(str(folder / "adapter"), str(model)))
    merge = Merge(read_shards(model), skeleton(model, "none", "bfloat16"), adapter, "bfloat16", torch.device("cpu"))
    merge.try_out(dtype)
    merge.write(target, dtype)
    write_config(model, target, dtype)


def peft(folder: Path, target: Path, dtype: str, shard_mb: int) -> None:
    """Merge as peft's documentation says."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype), device_map={"": "cpu"})
    merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    merged.save_pretrained(target, max_shard_size=f"{shard_mb}MB")


def run_side(work: argparse.Namespace) -> None:
    """Be one side: merge once into the folder that the command names; answer with the time and the peak."""
    channel = Channel()
    import peft as peft_library
    import torch
    import transformers

    from lowmem_rlhf.export.merging import merge  # noqa: F401 (so that the clock does not count the import)

    getattr(transformers, "LlamaForCausalLM"), getattr(peft_library, "PeftModel")  # noqa: B009 (imported when first named)
    channel.ready(torch=torch.__version__, peft=peft_library.__version__)
    target = Path(channel.command())
    target.mkdir()
    before, start = resident("VmRSS"), time.perf_counter()
    if work.side == "ours":
        ours(work.folder, target, work.dtype)
    else:
        peft(work.folder, target, work.dtype, work.shard_mb)
    seconds = time.perf_counter() - start
    channel.send(seconds=seconds, before=before, peak=resident("VmHWM"))


def resident(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(work: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Let the sides merge in turns, each time in a fresh process; return the figures."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    difference = 0.0
    for turn in range(work.repeats):
        for side in SIDES if turn % 2 else reversed(SIDES):
            child = Child(side, [__file__, *sys.argv[1:], "--folder", str(work.folder), "--side", side])
            child.answer()
            run = child.take(str(work.folder / side))
            child.close()
            say(f"{side}: {run['seconds']:.1f} s, {run['peak'] / 1e6:,.0f} MB")
            runs[side].append(run)
        difference = max(difference, compare(work.folder / "ours", work.folder / "peft"))
        for side in SIDES:
            shutil.rmtree(work.folder / side)
    return {**{side: figures(one) for side, one in runs.items()}, "largest_difference": difference}


def figures(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Sum up a side's runs: the median time, the highest peak, and that less what was resident before."""
    return {
        "seconds": statistics.median([run["seconds"] for run in runs]),
        "all_seconds": [run["seconds"] for run in runs],
        "peak_bytes": max(run["peak"] for run in runs),
        "beyond_libraries": max(run["peak"] - run["before"] for run in runs),
    }


def compare(ours: Path, theirs: Path) -> float:
    """Return the largest difference of both merged models' tensors, relative to a tensor's norm.

    Raises:
        SystemExit: one holds other tensors, or another dtype.
    """
    from lowmem_rlhf.export.shards import read_shards

    left, right = ({n: t for file in read_shards(f).values() for n, t in file.items()} for f in (ours, theirs))
    if {n: (t.shape, t.dtype) for n, t in left.items()} != {n: (t.shape, t.dtype) for n, t in right.items()}:
        raise SystemExit("the sides wrote different tensors")
    norms = ((left[name].read().float(), right[name].read().float()) for name in left)
    return max(float((a - b).norm() / b.norm()) for a, b in norms)


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return ours / peft's."""
    keys = {"peak": "peak_bytes", "time": "seconds", "beyond_libraries": "beyond_libraries"}
    return {name: found["ours"][key] / found["peft"][key] for name, key in keys.items()}


def print_table(found: dict[str, Any], model_bytes: int) -> None:
    """Print the figures for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"merging an adapter into a model of {model_bytes / 1e9:.2f} GB", title_style="bold")
    for column in ("", "ours", "peft", "ours / peft"):
        table.add_column(column, justify="left" if not column else "right")
    sides, ratio = [found[side] for side in SIDES], ratios(found)
    table.add_row("time", *(f"{side['seconds']:.1f} s" for side in sides), f"{ratio['time']:.3f}")
    table.add_row("peak resident memory", *(f"{s['peak_bytes'] / 1e6:,.0f} MB" for s in sides), f"{ratio['peak']:.3f}")
    beyond = (f"{side['beyond_libraries'] / 1e6:,.0f} MB" for side in sides)
    table.add_row("memory beyond the libraries", *beyond, f"{ratio['beyond_libraries']:.3f}")
    Console().print(table)
    print(f"largest relative difference of a tensor: {found['largest_difference']:.2g}")
    for name, bound in BOUNDS.items():
        verdict = "holds" if ratio[name] <= bound else "MISSED"
        print(f"{name}: {ratio[name]:.3f} of peft's; must be at most {bound}: {verdict}")


def main() -> None:
    work = options().parse_args()
    if work.side:
        run_side(work)
        return
    if work.repeats < 1:
        raise SystemExit(f"--repeats: got {work.repeats}; at least one merge has to be timed")
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        work.folder = Path(folder)
        size = make_model(work.folder, work)
        found = measure(work, lambda text: print(text, file=sys.stderr, flush=True))
    if work.json:
        kept = {key: value for key, value in vars(work).items() if key not in ("json", "side", "folder")}
        result = {"work": kept, "model_bytes": size, "load_average": os.getloadavg()[0], **found}
        print(json.dumps({**result, "ratios": ratios(found)}, indent=2))
    else:
        print_table(found, size)


if __name__ == "__main__":
    main()
