"""Model folders made for a benchmark: a real model with fewer layers, and a tiny random one."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from lowmem_rlhf.bench.model import byte_tokenizer

__all__ = ["byte_tokenizer", "model_folder", "tiny_llama", "truncated"]

TINY = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers")


def model_folder(model: str) -> Path:
    """Return the local folder of a model in transformers' format; a GGUF is converted, a Hub id fetched."""
    from lowmem_rlhf.architecture.source import is_local, resolve_model
    from lowmem_rlhf.engine.load import convert_gguf

    path = resolve_model(model)
    if not is_local(path):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    return convert_gguf(Path(path)) if path.endswith(".gguf") else Path(path)


def truncated(folder: Path, layers: int, target: Path) -> Path:
    """Make ``target`` the same model with its first ``layers`` layers only; other files are linked.

    Raises:
        ValueError: the model has fewer layers.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    key = next(key for key in LAYER_KEYS if key in config)
    if not 1 <= layers <= config[key]:
        raise ValueError(f"got {layers} layers; {folder} has {config[key]}")
    config[key] = layers
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:layers]
    target.mkdir(parents=True)
    kept: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if _layer_of(name) < layers]  # noqa: SIM118 (not a dict)
            kept |= {name: tensors.get_tensor(name) for name in names}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.name == "config.json" or file.is_dir() or "safetensors" in file.name:
            continue
        try:
            os.symlink(file.resolve(), target / file.name)
        except OSError:  # Windows without the right to link
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def _layer_of(name: str) -> int:
    """Return the number of the layer that a tensor belongs to; -1 for one outside the layers."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else -1


def tiny_llama(folder: Path) -> Path:
    """Write a random Llama of four layers with a tokenizer of bytes into ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, eos_token_id=2, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
