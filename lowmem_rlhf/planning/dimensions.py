"""The sizes of a model, from its config.json or its GGUF header: no weights are read and no torch is imported."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.model.source import is_local, resolve_model
from lowmem_rlhf.planning.families import (
    FAMILIES,
    Linear,
    block_linears,
    check_causal,
    common_fields,
    family_of,
    other_parameters,
)
from lowmem_rlhf.suggest import did_you_mean

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_GGUF_NAMES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_GGUF_NAMES_OF = {
    "gpt2": {"attn_qkv": "c_attn", "attn_output": "c_proj", "ffn_up": "c_fc", "ffn_down": "c_proj"},
    "phi3": {"ffn_up": "gate_up_proj"},
}


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes of a decoder-only language model.

    Attributes:
        head_dim: dimension of one attention head; ``num_heads * head_dim`` need not be ``hidden_size``.
        tied: the output head is the token embedding.
        attention_bias: whether query, key and value have biases.
        gated: the MLP has a gate (SwiGLU, GeGLU) beside its up projection.
        max_positions: the longest sequence the model was made for, in tokens; None if unbounded.
        torch_dtype: of the stored weights, as config.json says; None when unknown (GGUF).
        linears: the linear layers of one block: these are quantized and take adapters.
        other_parameters: norms, biases and learned positions of the whole model.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    attention_bias: bool
    gated: bool
    max_positions: int | None
    torch_dtype: str | None
    linears: tuple[Linear, ...]
    other_parameters: int

    @property
    def linear_parameters(self) -> int:
        """Weights inside the quantizable linear layers of all blocks."""
        return self.num_layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Token embedding and output head; one matrix when they are tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied matrix counts once, as ``model.parameters()`` does."""
        return self.linear_parameters + self.embedding_parameters + self.other_parameters

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear layer of a block."""
        return max(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def overflows_float16(self) -> bool:
        """Whether the family's activations are known to exceed float16 (Gemma 3)."""
        return self.model_type in FAMILIES and FAMILIES[self.model_type].overflows_float16

    def lora_parameters(self, r: int, target_modules: Literal["all-linear"] | Iterable[str] = "all-linear") -> int:
        """Adapter parameters at rank r: ``r * (inputs + outputs)`` for every adapted layer (LoRA, arXiv 2106.09685).

        Raises:
            UserError: a target is no linear layer of the blocks.
        """
        names = [linear.name for linear in self.linears]
        targets = names if target_modules == "all-linear" else [str(name).rsplit(".", 1)[-1] for name in target_modules]
        for target in targets:
            if target not in names:
                raise UserError(
                    f"lora.target_modules: got {target!r}; the linear layers of a {self.model_type} block are "
                    f"{', '.join(dict.fromkeys(names))}{did_you_mean(target, names)}"
                )
        return self.num_layers * sum(r * (x.inputs + x.outputs) for x in self.linears if x.name in targets)


def model_dimensions(model: str, revision: str | None = None) -> ModelDimensions:
    """Return the sizes of a model.

    Args:
        model: as in a recipe: a Hub id, a local folder, a ``.gguf`` file or ``package:PACKAGE/FILE``.
        revision: branch, tag or commit of a Hub id.

    Raises:
        UserError: there is no such model, it cannot be reached, or it is no dense decoder-only language model.
    """
    resolved = resolve_model(model)
    if not is_local(resolved):
        from lowmem_rlhf.planning.hub import fetch_config

        return _from_config_file(fetch_config(resolved, revision), model)
    path = Path(resolved)
    return _from_config_file(path / "config.json", model) if path.is_dir() else _from_gguf(path, model)


def _from_config_file(path: Path, model: str) -> ModelDimensions:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r}: its config.json cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"model {model!r}: its config.json is not a JSON object")
    return dimensions_from_config(config, model)


def dimensions_from_config(config: Mapping[str, Any], model: str) -> ModelDimensions:
    """Return the sizes that a config.json tells; ``model`` is only named in errors.

    Raises:
        UserError: a field is missing, is not a positive whole number, or the model is of an unsupported kind.
    """
    model_type = check_causal(model, config)
    fields = common_fields(config)
    known = "" if model_type in FAMILIES else f" (model type {model_type!r} is not known, so all of them are needed)"
    if missing := [key for key in _NEEDED if key not in fields]:
        raise UserError(f"model {model!r}: its config.json lacks {', '.join(missing)}{known}")
    family = family_of(model_type, fields)
    numbers = {key: _positive(fields[key], key, model) for key in _NEEDED}
    hidden, heads = numbers["hidden_size"], numbers["num_attention_heads"]
    kv_heads = _positive(fields.get("num_key_value_heads", heads), "num_key_value_heads", model)
    dim = _positive(fields.get("head_dim", family.head_dim or hidden // heads), "head_dim", model)
    if heads % kv_heads:
        raise UserError(
            f"model {model!r}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    positions = fields.get("max_position_embeddings")
    if model_type == "gpt2" and positions is None:
        raise UserError(f"model {model!r}: its config.json lacks n_positions")
    linears = block_linears(family, fields, heads=heads, kv_heads=kv_heads, dim=dim)
    dtype = fields.get("dtype", fields.get("torch_dtype"))
    return ModelDimensions(
        model_type=model_type,
        hidden_size=hidden,
        num_layers=numbers["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=numbers["intermediate_size"],
        vocab_size=numbers["vocab_size"],
        tied=bool(fields.get("tie_word_embeddings", family.tied)),
        attention_bias=linears[0].bias,
        gated=family.gated,
        max_positions=None if positions is None else _positive(positions, "max_position_embeddings", model),
        torch_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        linears=tuple(linears),
        other_parameters=other_parameters(family, fields, linears, heads=heads, kv_heads=kv_heads, dim=dim),
    )


def _positive(value: Any, key: str, model: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"model {model!r}: its config gives {key} = {value!r}; a whole number of at least 1 is expected"
        )
    return value


def _from_gguf(path: Path, model: str) -> ModelDimensions:
    """Read the sizes from a GGUF header; parameters are counted from the tensors' shapes."""
    from lowmem_rlhf.planning.gguf_header import read_gguf_header

    header = read_gguf_header(path)
    arch = str(header.fields.get("general.architecture", ""))
    check_causal(model, {"model_type": arch, "num_experts": header.fields.get(f"{arch}.expert_count")})
    embedding = header.shapes.get("token_embd.weight")
    linears = _gguf_linears(arch, header.shapes)
    if embedding is None or len(embedding) != 2 or not linears:
        raise UserError(f"model {model!r} is a GGUF without token_embd.weight or blocks; is it only a part of a model?")

    def number(key: str, default: int | None = None) -> int:
        value = header.fields.get(f"{arch}.{key}", default)
        value = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
        if value is None:
            raise UserError(f"model {model!r}: its GGUF metadata lacks {arch}.{key}")
        return _positive(value, f"{arch}.{key}", model)

    layers, heads = number("block_count"), number("attention.head_count")
    hidden, vocabulary = embedding
    tied = "output.weight" not in header.shapes
    counted = {name: shape for name, shape in header.shapes.items() if not name.startswith("rope_")}
    in_linears = layers * sum(linear.inputs * linear.outputs for linear in linears)
    in_embeddings = hidden * vocabulary * (1 if tied else 2)
    return ModelDimensions(
        model_type=arch,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=number("attention.key_length", hidden // heads),
        intermediate_size=number("feed_forward_length"),
        vocab_size=vocabulary,
        tied=tied,
        attention_bias=linears[0].bias,
        gated=any(name in ("gate_proj", "gate_up_proj") for name in (linear.name for linear in linears)),
        max_positions=number("context_length") if f"{arch}.context_length" in header.fields else None,
        torch_dtype=None,
        linears=tuple(linears),
        other_parameters=sum(map(math.prod, counted.values())) - in_linears - in_embeddings,
    )


def _gguf_linears(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Linear]:
    names = {**_GGUF_NAMES, **_GGUF_NAMES_OF.get(arch, {})}
    found = {}
    for tensor, name in names.items():
        shape = shapes.get(f"blk.0.{tensor}.weight")
        if shape is not None and len(shape) == 2:
            found[tensor] = Linear(name, shape[0], shape[1], f"blk.0.{tensor}.bias" in shapes)
    return list(found.values())
