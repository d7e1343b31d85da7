"""Tiny models of every type that AutoModelForCausalLM knows, with weights whose statistics are those of real models.

    from tiny_architectures import tiny  # with this folder on the import path
    model = tiny("hyperclovax", seed=0)

A type's configuration class is shrunk field by field (see `tiny_fields`); a layer of every kind stays. Random weights
near their initial values hide wrong forms: a norm whose weights are all near 1 is nearly right without them. Here norms
have large means, outliers, zeros and negative entries, biases are not zero, and factors that are 1 by default are not.
What keeps the numbers finite is that every linear layer is scaled until its outputs on random tokens are of order one.
"""

import dataclasses
import functools
import zlib
from pathlib import Path
from typing import Any

from tiny_fields import FACTORS, FORMS, LATENT, NUMBERS, OPTIONAL, OWN, SWITCHES, VOCABULARY

PAD, UNKNOWN, BOS, EOS = range(4)
TOKENS = 260  # ids below are drawn
MOST_LAYERS = 6
PRETRAINED = 32  # positions, where rotary tables are scaled for longer texts
NORMS = (
    (1.0, 0.3, 8.0),
    (8.0, 4.0, 30.0),
    (29.0, 15.0, 94.0),
    (0.0, 0.6, 5.0),
)  # mean, deviation and outlier of weights
NORMS_OF_HEADS = ((1.0, 0.3, 3.0), (1.5, 0.5, 3.0), (0.0, 0.6, 2.0))


def model_types() -> list[str]:
    """Return every model type that AutoModelForCausalLM has a class for, and further forms of some."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FORMS])


def tiny_config(name: str, **changes: Any) -> Any:
    """Return the configuration of a type's tiny model."""
    from transformers import CONFIG_MAPPING

    model_type, form = FORMS.get(name, (name, {}))
    return shrunk(CONFIG_MAPPING[model_type], {**OWN.get(model_type, {}), **form, **changes})


def shrunk(config_class: Any, own: dict[str, Any]) -> Any:
    """Return a small configuration of a class: rules by field name, a layer of every kind, and what ``own`` says."""
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    values: dict[str, Any] = {}
    for field_name, field in fields.items():
        default = field.default
        if isinstance(default, bool):
            if field_name in SWITCHES:
                values[field_name] = SWITCHES[field_name]
        elif field_name in NUMBERS and isinstance(default, int | float | list):
            small = NUMBERS[field_name]
            values[field_name] = min(small, default) if isinstance(default, int | float) else [small] * len(default)
        elif field_name in FACTORS and isinstance(default, int | float):
            values[field_name] = FACTORS[field_name]
        elif field_name in OPTIONAL and default is None:
            values[field_name] = OPTIONAL[field_name]
    if "kv_lora_rank" in fields:
        values |= {name: number for name, number in LATENT.items() if name in fields}
    values |= token_ids(fields)
    try:
        default = {name: value for name, value in vars(config_class()).items() if name in fields}
    except Exception:  # one that does not stand its own defaults
        default = {}
    values |= layer_kinds(default)
    if rotary := shortened(default.get("rope_parameters")):
        values["rope_parameters"] = rotary
    values |= sub_configs(config_class, own)
    return config_class(**{**values, **own})


def token_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a vocabulary's size and special tokens inside it."""
    known = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": BOS}
    values: dict[str, Any] = {name: known[name] for name in known if name in fields}
    values |= {n: VOCABULARY for n in ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size") if n in fields}
    values |= {n: None for n in ("forced_eos_token_id", "forced_bos_token_id") if n in fields}
    others = sorted(n for n in fields if n.endswith(("_token_id", "_token_index")) and n not in values)
    numbered = {n: VOCABULARY - 1 - i for i, n in enumerate(others)}
    return {
        **numbered,
        **values,
        **({"unpadded_vocab_size": VOCABULARY - 7} if "unpadded_vocab_size" in fields else {}),
    }


def layer_kinds(default: dict[str, Any]) -> dict[str, Any]:
    """Return lists with one entry a layer, and their length: the first layer of every kind that the default has."""
    count = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(default.get(n), int)), "")
    layers = default.get(count, 0)
    lists = {name: v for name, v in default.items() if isinstance(v, list) and len(v) == layers > 4}
    if not lists:
        return {}
    kinds = list(zip(*(map(str, values) for values in lists.values()), strict=True))
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    first = [*range(2)] if len(first) < 2 else first[:MOST_LAYERS]
    return {count: len(first), **{name: [values[i] for i in first] for name, values in lists.items()}}


def shortened(rotary: Any) -> dict[str, Any]:
    """Return rotary parameters whose length in pretraining is less than that of the tiny model's texts."""
    if not isinstance(rotary, dict):
        return {}
    if any(isinstance(value, dict) for value in rotary.values()):  # one set a kind of layer
        return {kind: shortened(one) if isinstance(one, dict) else one for kind, one in rotary.items()}
    known = "original_max_position_embeddings"
    return {**rotary, known: PRETRAINED} if known in rotary else dict(rotary)


def sub_configs(config_class: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return the shrunk configurations inside one; ``own`` may hold fields of theirs, which it loses."""
    from transformers import CONFIG_MAPPING, AutoConfig

    found: dict[str, Any] = {}
    for name, inner in (getattr(config_class, "sub_configs", None) or {}).items():
        fields = own.pop(name, {})
        if fields is None:
            found[name] = None
            continue
        if inner is AutoConfig:
            inner = CONFIG_MAPPING[config_class.sub_configs_defaults[name].model_type]
        found[name] = shrunk(inner, dict(fields))
    return found


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return a type's tiny model in fp32 with stock attention; its weights are those of a bfloat16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.requires_grad_(False)
    model.eval()
    draw_weights(model, torch.Generator(device="cpu").manual_seed(seed + zlib.crc32(name.encode())))
    calibrate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))
    return model


def draw_weights(model: Any, generator: Any) -> None:
    """Give every parameter of a model random values of a size that it has in real models, in place."""
    import torch
    from torch import nn

    def normal(p: Any) -> Any:
        return torch.empty(p.shape, dtype=torch.float32, device="cpu").normal_(generator=generator)

    embedding = float(torch.tensor([0.02, 0.2, 1.0])[torch.randint(3, (1,), generator=generator)])
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                p.data = normal(p) * embedding
            elif "norm" in type(module).__name__.lower() and name == "weight" and p.ndim == 1:
                p.data = norm_weights(p.shape[0], any(k in module_name for k in ("q_norm", "k_norm")), generator)
            elif name.endswith("bias"):
                spread = torch.where(normal(p) > 1.2, 4.0, 0.5)  # one in nine lies far out
                p.data = p + spread * normal(p)
            elif p.ndim < 2:
                p.data = p + 0.2 * normal(p)
            elif isinstance(module, nn.Linear | nn.Conv1d) or p.ndim == 2:
                p.data = normal(p) * (p.numel() / p.shape[0]) ** -0.5
            else:
                p.data = normal(p) * p.shape[-1] ** -0.5


def norm_weights(size: int, small: bool, generator: Any) -> Any:
    """Return a norm's weights (size,): near one, large (Gemma's), or around zero, with outliers, zeros and negatives.

    Args:
        small: those of queries and keys, which would saturate the softmax if they were as large as others.
    """
    import torch

    kinds = NORMS_OF_HEADS if small else NORMS
    mean, std, most = kinds[int(torch.randint(len(kinds), (1,), generator=generator))]
    values = mean + std * torch.empty(size, dtype=torch.float32, device="cpu").normal_(generator=generator)
    places = torch.randperm(size, generator=generator)[: max(3, size // 8)]
    values[places] = torch.empty(len(places), dtype=torch.float32, device="cpu").uniform_(
        -0.6, 0.6, generator=generator
    )
    values[places[:2]] = torch.tensor([most, 0.0], dtype=torch.float32, device="cpu")
    return values


def calibrate(model: Any) -> None:
    """Scale every linear layer until its outputs on random tokens have a root mean square of 1, and the logits of 2.

    So log-probs differ as a real model's do. A head that is tied to the embeddings scales these too, hence two passes.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    ids = torch.randint(EOS + 1, TOKENS, (4, 24), generator=torch.Generator(device="cpu").manual_seed(0), device="cpu")
    for _ in range(2):
        scale = functools.partial(_to_one, set())
        hooks = [layer.register_forward_hook(scale) for layer in layers]
        try:
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits.float()
        finally:
            for hook in hooks:
                hook.remove()
        size = float((logits - logits.mean(-1, keepdim=True)).square().mean().sqrt())
        if head is not None and size > 0:
            head.weight.data.mul_(2 / size)


def _to_one(done: set[int], module: Any, inputs: Any, output: Any) -> Any:
    """As a forward hook: scale a layer that is not among those ``done``, and return what it gives then."""
    if id(module.weight) in done or not hasattr(output, "square"):  # a router gives several
        return None
    done.add(id(module.weight))
    bias = 0 if module.bias is None else module.bias
    size = float((output - bias).square().mean().sqrt())
    if not size > 0:
        return None
    module.weight.data.mul_(1 / size)
    return (output - bias) / size + bias


def tokenizer() -> Any:
    """Return a tokenizer of bytes for the whole vocabulary, with a chat template of the plainest kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [f"<extra_{index}>" for index in range(len(symbols), VOCABULARY)]
    bytes_only = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, **special)


def save_tiny(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a type's tiny model with its tokenizer as a local model folder, its weights in bfloat16."""
    import torch

    model = tiny(name, seed, **changes).to(torch.bfloat16)
    model.save_pretrained(folder)
    if model.config.model_type not in model_types():  # the text part of a type, which is loaded by the whole's name
        tiny_config(name, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
