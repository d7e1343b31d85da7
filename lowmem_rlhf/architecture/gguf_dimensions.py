"""The sizes of a model from the header of its GGUF file; parameters are counted from the tensors' shapes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.config_fields import block_traits, positive
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.families import block_of, family_of_gguf
from lowmem_rlhf.architecture.families.block import Linear
from lowmem_rlhf.architecture.families.row import Family
from lowmem_rlhf.architecture.gguf_header import read_gguf_header
from lowmem_rlhf.architecture.kinds import check_experts, check_kind
from lowmem_rlhf.errors import UserError

# of Llama's linear layers, llama.cpp's names -> transformers'
_LAYER_NAMES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}


def from_gguf(path: Path, model: str) -> ModelDimensions:
    """Return the sizes that a GGUF header tells; ``model`` is only named in errors.

    Raises:
        UserError: the header is damaged, lacks a field, or the model is of an unsupported kind.
    """
    header = read_gguf_header(path)
    arch = str(header.fields.get("general.architecture", ""))
    model_type, family = family_of_gguf(arch)
    check_kind(model, {"model_type": model_type})
    check_experts(model, {"num_experts": header.fields.get(f"{arch}.expert_count")})
    embedding = header.shapes.get("token_embd.weight")
    linears = _linears(family, header.shapes)
    if embedding is None or len(embedding) != 2 or not linears:
        raise UserError(f"model {model!r} is a GGUF without token_embd.weight or blocks; is it only a part of a model?")

    def number(key: str, default: int | None = None) -> int:
        value = header.fields.get(f"{arch}.{key}", default)
        value = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
        if value is None:
            raise UserError(f"model {model!r}: its GGUF metadata lacks {arch}.{key}")
        return positive(value, f"{arch}.{key}", model)

    layers, heads = number("block_count"), number("attention.head_count")
    hidden, vocabulary = embedding
    dim = number("attention.key_length", hidden // heads)
    tied = "output.weight" not in header.shapes
    tensors = {name: shape for name, shape in header.shapes.items() if not name.startswith("rope_")}
    in_linears = layers * sum(linear.inputs * linear.outputs for linear in linears)
    in_embeddings = hidden * vocabulary * (1 if tied else 2)
    gated = any(linear.name in ("gate_proj", "gate_up_proj") for linear in linears)
    return ModelDimensions(
        model_type=model_type,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=dim,
        intermediate_size=number("feed_forward_length"),
        vocab_size=vocabulary,
        tied=tied,
        attention_bias=linears[0].bias,
        gated=gated,
        max_positions=number("context_length") if f"{arch}.context_length" in header.fields else None,
        torch_dtype=None,
        linears=tuple(linears),
        other_parameters=sum(map(math.prod, tensors.values())) - in_linears - in_embeddings,
        **block_traits(
            block_of(model_type, {"hidden_act": "silu" if gated else "gelu"}),
            _config(header.fields, arch, layers, dim),
            dim,
        ),
        note=_doubt(arch, family),
    )


def _doubt(arch: str, family: Family) -> str:
    if family.block and family.counted:
        return f"the layers of {arch!r} are estimated, as a GGUF does not tell all of their sizes"
    return "" if family.block else f"the architecture {arch!r} is not known here: taken for Llama's"


def _linears(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[Linear]:
    """Return the linear layers of the first block, as peft names them."""
    names = {**_LAYER_NAMES, **(family.gguf.layer_names if family.gguf else {})}
    linears = []
    for tensor, name in names.items():
        shape = shapes.get(f"blk.0.{tensor}.weight")
        if shape is not None and len(shape) == 2:
            linears.append(Linear(name, shape[0], shape[1], f"blk.0.{tensor}.bias" in shapes))
    return linears


def _config(fields: Mapping[str, Any], arch: str, layers: int, dim: int) -> dict[str, Any]:
    """Return what `block_traits` reads of a config.json, from the names it has in a header."""
    window = fields.get(f"{arch}.attention.sliding_window")
    config = {"num_hidden_layers": layers, "sliding_window": window, "use_sliding_window": window is not None}
    if rotated := fields.get(f"{arch}.rope.dimension_count"):
        config["partial_rotary_factor"] = rotated / dim
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if f"{arch}.{name}" in fields:
            config[name] = fields[f"{arch}.{name}"]
    return config
