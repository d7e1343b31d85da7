"""Folders that are given as a model and hold something else, or a model in another form. No torch here."""

import json
from pathlib import Path

from lowmem_rlhf.algorithms.registry import find_spec
from lowmem_rlhf.run.base_file import full_precision
from lowmem_rlhf.run.stages import run_of, to_finish

ADAPTER_CONFIG, CONFIG, INDEX = "adapter_config.json", "config.json", "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "model*.bin", "*.pth", "consolidated*.pt")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def why_no_model(folder: Path) -> str:
    """Return what a folder is, if it is no model that can be loaded, and what to give instead; else nothing."""
    if (folder / ADAPTER_CONFIG).is_file():  # even beside weights: transformers would load the base that it names
        return _adapter(folder)
    if (folder / CONFIG).is_file():
        pickled = [path.name for pattern in PICKLED for path in sorted(folder.glob(pattern))]
        if not pickled or (folder / INDEX).is_file() or any(folder.glob("*.safetensors")):
            return ""
        return (
            f"holds its weights as {pickled[0]}, which can only be read by unpickling it, which runs what others put "
            "there; take a copy with safetensors weights, or where you trust it load it with transformers "
            "(AutoModelForCausalLM.from_pretrained) and save_pretrained it into a new folder"
        )
    if run := run_of(folder):
        return _run(run)
    return f"is a folder without {CONFIG}, so it holds no transformers model{_inside(folder)}"


def _adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    model = full_precision(str(base)) if base else "ITS_BASE"
    return f"is an adapter's folder, not a model; give its base and the adapter: model={model} adapter={folder}"


def _run(path: Path) -> str:
    """Return what to give for a run's folder: its finished model, its export, or its adapter on its base."""
    from lowmem_rlhf.run.directory import ADAPTER, MODEL, RunDirectory

    values = RunDirectory(path).recipe_values()
    spec = find_spec(values.get("algorithm"))
    if spec is not None and spec.leaves == MODEL:
        if (path / MODEL / CONFIG).is_file():
            return f"is a {spec.title}'s run; its model is {path / MODEL}"
        return f"is a {spec.title}'s run without a finished model; {to_finish(path)}"
    merged = path / "export" / "merged"
    if not (path / ADAPTER).is_dir():
        return f"is a run that is not finished; {to_finish(path)}"
    take = (
        f"take its export, model={merged}"
        if (merged / CONFIG).is_file()
        else (f"export it (lowmem-rlhf export {path}) and give model={merged}")
    )
    return f"is a run, not a model; {take}, or go on from its adapter: model={values.get('model')} adapter={path}"


def _inside(folder: Path) -> str:
    """Return a hint at what lies in a folder."""
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        return f"; for the GGUF in it give model={folder / files[0]}"
    if any(folder.glob("adapter_model.*")):
        return (
            f"; it holds an adapter's weights, but not their {ADAPTER_CONFIG}: copy it there and give adapter={folder}"
        )
    if any(folder.glob("*.safetensors")):
        return f"; it holds weights: copy the model's {CONFIG} and its tokenizer there"
    inside = [path.parent for path in folder.glob(f"*/{CONFIG}")]
    inside += [path.parent for path in folder.glob(f"snapshots/*/{CONFIG}")]
    if inside:
        return f"; did you mean model={max(inside, key=lambda path: path.stat().st_mtime)}?"
    if steps := [path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")]:
        newest = max(steps, key=lambda path: path.stat().st_mtime)
        return f"; it holds adapters: give their base as the model, and adapter={newest}"
    if any((folder / name).is_file() for name in TOKENIZER):
        return "; it holds a tokenizer alone: give the folder that has the weights too"
    return ""
