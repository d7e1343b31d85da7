"""Count a model's parameters on its real transformers class: built on torch's meta device, so no weight is made.

Run as a program by `counting`: the content of a config.json on standard input, the count as JSON on the last line of
the output. Code of a model's own is never run.
"""

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.config_fields import LIMITS
from lowmem_rlhf.errors import one_line

# beside the sizes in LIMITS, what the memory model reads of a config; a class may know it under another name
FIELDS = (*LIMITS, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "layer_types")


def count_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model class of a config has.

    Returns:
        ``fields``: sizes of the config under their common names. Parameters: ``total``; ``embedding``; ``head``, 0
        where it is the embedding; ``stacked``, of experts in three dimensions; ``tables``, of further embeddings
        that are looked up by token (Gemma's of each layer). ``linears``: for each linear layer
        but the head its module's name, inputs, outputs, whether it has a bias, whether bitsandbytes quantizes it and
        whether ``all-linear`` adapts it.

    Raises:
        LookupError: transformers has no class for the model type.
        Exception: whatever the class raises for a config that it refuses.
    """
    import torch
    from torch import nn
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    from lowmem_rlhf.architecture.experts import expert_stacks

    if config["model_type"] not in CONFIG_MAPPING:
        raise LookupError("transformers has no class for it")
    with tempfile.TemporaryDirectory() as folder:  # read as a model's own, with what JSON cannot say decoded
        fields = {key: value for key, value in config.items() if key != "auto_map"}
        Path(folder, "config.json").write_text(json.dumps(fields), encoding="utf-8")
        resolved = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(resolved, trust_remote_code=False)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    rows = embedding.shape[0]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight.shape[0] >= rows]
    return {
        "fields": _fields(resolved.get_text_config(decoder=True)),
        "total": sum(p.numel() for p in model.parameters()),
        "embedding": embedding.numel(),
        "head": 0 if head is None or head.weight is embedding else head.weight.numel(),
        "tables": sum(m.weight.numel() for m in tables if m.weight is not embedding),
        "stacked": sum(getattr(module, name).numel() for module, name in expert_stacks(model)),
        "linears": _linears(model, head, config["model_type"]),
    }


def _fields(config: Any) -> dict[str, Any]:
    """Return the sizes of a config under their common names; the largest where each layer has its own."""
    sizes = {}
    for key in FIELDS:
        with suppress(Exception):  # a config may refuse to tell one that differs from layer to layer
            value = getattr(config, key)
            numbers = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, int) for one in value)
            sizes[key] = max(value) if numbers else value
    return {key: value for key, value in sizes.items() if isinstance(value, (int, list)) and value}


def _linears(model: Any, head: Any, model_type: str) -> list[list[Any]]:
    """Return all linear layers but the head, as bitsandbytes' loader and peft's ``all-linear`` see them.

    Shared layers are there once. A subclass of ``nn.Linear`` (Falcon's) takes adapters, but is not quantized.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    from lowmem_rlhf.architecture.experts import names_beside_experts
    from lowmem_rlhf.architecture.families import family_of

    beside = names_beside_experts(model)
    skipped = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    linears = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or module is head:
            continue
        outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        plain = isinstance(module, Conv1D) or type(module) is nn.Linear
        quantized = plain and should_convert_module(name, skipped)
        last = name.rsplit(".", 1)[-1]
        adapted = last not in family_of(model_type).bypassed and (beside is None or last in beside)
        linears.append([name, inputs, outputs, module.bias is not None, quantized, adapted])
    return linears


def layer_of(name: str) -> str:
    """Return the decoder layer that a module is in: its name up to the first number; empty outside of layers."""
    match = re.match(r"(?:.*?\.)??\d+(?=\.)", name)
    return match[0] if match else ""


if __name__ == "__main__":
    try:
        print("\n" + json.dumps(count_class(json.load(sys.stdin))))
    except LookupError as error:
        sys.exit(str(error))
    except Exception as error:
        reason = one_line(error)
        sys.exit(f"its class in transformers refuses this config: {reason}")
