"""Whole runs of a tiny random Llama: the model on disk, recipes for it, and what no device must change."""

import json
import string
from pathlib import Path
from typing import Any

from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory

SYMBOLS = ["<pad>", "</s>", "<s>", *string.digits, *"abcdefgh", " ", "+", "-", "?", ".", "="]
# Metrics that measure the machine and not what was computed.
MEASURED = ("time/", "memory/", "gpu/")


def save_tiny_model(folder: Path, seed: int = 0, model_type: str = "llama", **changes: Any) -> Path:
    """Write a random two-layer model, a Llama by default, with a tokenizer of single characters; return the folder."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    fields: dict[str, Any] = {
        "vocab_size": len(SYMBOLS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **{**fields, **changes})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def save_tiny_chat_model(folder: Path) -> Path:
    """Write the model of `save_tiny_model` with a chat template; return the folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}={% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def tiny_values(model: Path | str) -> dict[str, Any]:
    """Return the values of a recipe of three steps whose reward, the completion's length, is easy to move."""
    return {
        "name": "tiny",
        "model": str(model),
        "hardware": {
            "device": "cpu",
            "quantization": "none",
            "compute_dtype": "float32",
            "gradient_checkpointing": True,
            "micro_batch_tokens": 96,
            "rollout_batch_size": 8,
            "logits_tile_tokens": 16,
        },
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {
            "train": "arithmetic",
            "eval_size": 4,
            "train_size": 16,
            "template": "{question}=",
            "max_prompt_length": 16,
        },
        "generation": {"num_generations": 4, "max_completion_length": 12},
        "rewards": [{"function": "length", "options": {"target": 12}}],
        "grpo": {"beta": 0.04},
        "training": {
            "max_steps": 3,
            "prompts_per_step": 4,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "save_steps": 2,
            "log_completions": 4,
        },
    }


def tiny_recipe(model: Path | str, **sections: Any) -> Recipe:
    """Return `tiny_values` as a recipe, with keys of its sections replaced."""
    values = tiny_values(model)
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_recipe(values)


def learned(run: RunDirectory) -> dict[str, Any]:
    """Return what a run computed: metrics without the machine's, samples, held-out results and the adapter."""
    from safetensors.torch import load_file

    rows = [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in run.metrics()]
    return {
        "metrics": rows,
        "samples": run.samples(),
        "evaluation": run.evaluation(),
        "adapter": load_file(run.path / "adapter" / "adapter_model.safetensors"),
    }


def at_rate(optimizer: Any, rate: float) -> None:
    """Let an optimizer learn at a rate that no recipe allows."""
    for group in optimizer.torch_optimizer.param_groups:
        group["lr"] = group["initial_lr"] = rate
    optimizer.scheduler.base_lrs = [rate] * len(optimizer.scheduler.base_lrs)
    optimizer.scheduler._last_lr = [rate] * len(optimizer.scheduler.base_lrs)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a JSONL file; return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
