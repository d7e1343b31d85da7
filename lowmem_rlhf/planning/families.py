"""What the blocks of each model family consist of, from the fields of its ``config.json``.

Read from the model classes of transformers 5; a test holds every family against the parameter count of the real class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowmem_rlhf.errors import UserError


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block, as peft names it; ``inputs`` x ``outputs`` weights and ``outputs`` biases if any."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Family:
    """How a family departs from Llama.

    Attributes:
        norms: norm vectors of ``hidden_size`` in a block.
        norm_bias: whether norms have a bias too (LayerNorm).
        norm_weights: whether norms have weights at all (OLMo's do not).
        qk_norm: norms of queries and keys: none, over each head's dimension, or over all heads.
        qkv_bias, out_bias, mlp_bias: always there, never, or as the named config field says.
        gated: gate and up projections (SwiGLU) instead of one.
        fused: query, key and value in one layer, gate and up in one.
        names: of the layers: attention output, then MLP in order.
        tied: the default of ``tie_word_embeddings``.
        head_bias: a bias on the output head.
        head_dim: the default; None for ``hidden_size / num_attention_heads``.
        overflows_float16: activations exceed 65504, so float16 gives inf.
    """

    norms: int = 2
    norm_bias: bool = False
    norm_weights: bool = True
    qk_norm: Literal["none", "head", "all"] = "none"
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True
    fused: bool = False
    names: tuple[str, ...] = ("o_proj", "gate_proj", "up_proj", "down_proj")
    tied: bool = False
    head_bias: bool = False
    head_dim: int | None = None
    overflows_float16: bool = False


_BIAS: dict[str, Any] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_GEMMA: dict[str, Any] = {**_BIAS, "tied": True, "head_dim": 256}
_GEMMA3 = Family(**_GEMMA, norms=4, qk_norm="head", overflows_float16=True)
_GPT2 = Family(
    norm_bias=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gated=False,
    fused=True,
    tied=True,
    names=("c_proj", "c_fc", "c_proj"),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(**_BIAS, mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(**_BIAS, qk_norm="head", head_dim=128),
    "gemma": Family(**_GEMMA),
    "gemma2": Family(**_GEMMA, norms=4),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi": Family(
        norms=1,
        norm_bias=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        names=("dense", "fc1", "fc2"),
        head_bias=True,
    ),
    "phi3": Family(fused=True, names=("o_proj", "gate_up_proj", "down_proj")),
    "gpt2": _GPT2,
    "olmo": Family(**_BIAS, norm_weights=False),
    "olmo2": Family(**_BIAS, qk_norm="all"),
    "smollm3": Family(**_BIAS, mlp_bias="mlp_bias", tied=True),
}

ENCODERS = {"bert", "roberta", "distilbert", "electra", "albert", "deberta", "deberta-v2", "xlm-roberta", "mpnet"}
ENCODER_DECODERS = {"t5", "umt5", "mt5", "bart", "mbart", "pegasus", "marian", "led", "whisper", "t5gemma", "longt5"}

_GPT2_FIELDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}


def family_of(model_type: str, config: Mapping[str, Any]) -> Family:
    """Return the family of a model type; an unknown one is taken for Llama's layout, gated when it uses SiLU."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    gated = config.get("hidden_act", "silu") in ("silu", "swish")
    names = Family.names if gated else ("o_proj", "up_proj", "down_proj")
    return Family(**_BIAS, mlp_bias="mlp_bias", gated=gated, names=names)


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with GPT-2's field names turned into the common ones."""
    fields = {key: value for key, value in config.items() if value is not None}
    for old, new in _GPT2_FIELDS.items():
        if old in fields:
            fields.setdefault(new, fields[old])
    if "n_embd" in fields:
        fields.setdefault("intermediate_size", 4 * fields["n_embd"])
    return fields


def check_causal(model: str, config: Mapping[str, Any]) -> str:
    """Return the model type of a config of a text-only, decoder-only, dense model.

    Raises:
        UserError: it is an encoder, an encoder-decoder, takes images, is a mixture of experts, or names no type.
    """
    model_type = str(config.get("model_type") or "")
    if not model_type:
        raise UserError(f"model {model!r}: its config.json has no model_type, so it is no transformers model")
    if config.get("is_encoder_decoder") or model_type in ENCODER_DECODERS:
        raise UserError(
            f"model {model!r} is an encoder-decoder ({model_type}); a decoder-only language model is needed"
        )
    if model_type in ENCODERS:
        raise UserError(f"model {model!r} is an encoder ({model_type}); a decoder-only language model is needed")
    if "vision_config" in config or "audio_config" in config:
        raise UserError(f"model {model!r} ({model_type}) takes images or sound as well; a text-only model is needed")
    experts = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)), None)
    if experts:
        raise UserError(f"model {model!r} is a mixture of experts ({experts} {config[experts]}); a dense one is needed")
    return model_type


def block_linears(family: Family, config: Mapping[str, Any], *, heads: int, kv_heads: int, dim: int) -> list[Linear]:
    """Return the linear layers of one block, which are the ones that are quantized and take adapters."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    qkv, out, mlp = (_flag(value, config) for value in (family.qkv_bias, family.out_bias, family.mlp_bias))
    out_name, *mlp_names = family.names
    if family.fused:
        name = "c_attn" if family is _GPT2 else "qkv_proj"
        linears = [Linear(name, hidden, (heads + 2 * kv_heads) * dim, qkv)]
    else:
        widths = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        linears = [Linear(name, hidden, count * dim, qkv) for name, count in widths.items()]
    linears.append(Linear(out_name, heads * dim, hidden, out))
    up = 2 * inner if family.fused and family.gated else inner
    linears += [Linear(name, hidden, up, mlp) for name in mlp_names[:-1]]
    return [*linears, Linear(mlp_names[-1], inner, hidden, mlp)]


def other_parameters(
    family: Family, config: Mapping[str, Any], linears: list[Linear], *, heads: int, kv_heads: int, dim: int
) -> int:
    """Count what is in no linear weight and no embedding: norms, biases and learned positions."""
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    norm = hidden * (int(family.norm_weights) + int(family.norm_bias))
    qk = {"none": 0, "head": 2 * dim, "all": (heads + kv_heads) * dim}[family.qk_norm]
    biases = sum(linear.outputs for linear in linears if linear.bias)
    positions = int(config["max_position_embeddings"]) * hidden if family is _GPT2 else 0
    head_bias = int(config["vocab_size"]) if family.head_bias else 0
    return layers * (family.norms * norm + qk + biases) + norm + positions + head_bias


def _flag(value: bool | str, config: Mapping[str, Any]) -> bool:
    return bool(config.get(value, False)) if isinstance(value, str) else value
