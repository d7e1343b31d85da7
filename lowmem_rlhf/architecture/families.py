"""What the blocks of each model family consist of, from the fields of its ``config.json``.

Read from the model classes of transformers 5; a test holds every family against the parameter count, the linear layers
and the sliding windows of the real class.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block, as peft names it; ``inputs`` x ``outputs`` weights and ``outputs`` biases if any."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


Bias = bool | tuple[str, bool]  # always, never, or as the named config field says, with its default


@dataclass(frozen=True)
class Family:
    """How a family departs from Llama.

    Attributes:
        norm: RMSNorm, or LayerNorm.
        norms: norm vectors of ``hidden_size`` in a block.
        norm_place: whether attention and MLP are normed before, after, or on both sides.
        norm_bias: whether norms have a bias too (LayerNorm).
        norm_weights: whether norms have weights at all (OLMo's do not).
        qk_norm: norms of queries and keys: none, over each head's dimension, or over all heads.
        qkv_bias, out_bias, mlp_bias: see `Bias`.
        gated: gate and up projections (SwiGLU) instead of one.
        fused: query, key and value in one layer, gate and up in one.
        parallel: attention and MLP work on the block's input side by side.
        grouped: fewer key and value heads than query heads are possible.
        names: of the layers: attention output, then MLP in order.
        fused_name: of the query, key and value layer where they are one.
        tied: the default of ``tie_word_embeddings``.
        head_bias: a bias on the output head.
        head_dim: the default; None for ``hidden_size / num_attention_heads``.
        rotary: the part of a head that rotary positions turn; 0 where positions are learned.
        extra_positions: learned positions beyond ``max_position_embeddings``.
        activation: of the MLP, where the config does not say.
        embedding_scale: the embedding is multiplied by a number (Gemma, Granite), which makes a second copy of it.
        softcaps: defaults of the soft caps of attention scores and of logits (Gemma 2).
        window: the default of ``sliding_window``.
        window_opt_in: the window counts only if ``use_sliding_window`` is true, from layer ``max_window_layers`` on.
        full_every: every so many-th layer has no window; 0: all layers have it.
        overflows_float16: activations exceed 65504, so float16 gives inf.
    """

    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    norm_place: Literal["before", "after", "both"] = "before"
    norm_bias: bool = False
    norm_weights: bool = True
    qk_norm: Literal["none", "head", "all"] = "none"
    qkv_bias: Bias = False
    out_bias: Bias = False
    mlp_bias: Bias = False
    gated: bool = True
    fused: bool = False
    parallel: bool = False
    grouped: bool = True
    names: tuple[str, ...] = ("o_proj", "gate_proj", "up_proj", "down_proj")
    fused_name: str = "qkv_proj"
    tied: bool = False
    head_bias: bool = False
    head_dim: int | None = None
    rotary: float = 1.0
    extra_positions: int = 0
    activation: str = "silu"
    embedding_scale: bool = False
    softcaps: tuple[float | None, float | None] = (None, None)
    window: int | None = None
    window_opt_in: bool = False
    full_every: int = 0
    overflows_float16: bool = False

    @property
    def learned_positions(self) -> bool:
        """Whether positions are a table that is added to the embedding (GPT-2, OPT)."""
        return self.rotary == 0


_OFF: Bias = ("attention_bias", False)
_LLAMA = Family(qkv_bias=_OFF, out_bias=_OFF, mlp_bias=("mlp_bias", False))
_ATTENTION_BIASED = replace(_LLAMA, mlp_bias=False)
_LAYER_NORM = Family(norm="layer", norm_bias=True, gated=False, qkv_bias=True, out_bias=True, mlp_bias=True)
_GEMMA = replace(_ATTENTION_BIASED, tied=True, head_dim=256, activation="gelu_pytorch_tanh", embedding_scale=True)
_GEMMA2 = replace(_GEMMA, norms=4, norm_place="both", softcaps=(50.0, 30.0), window=4096, full_every=2)
_GEMMA3 = replace(_GEMMA2, qk_norm="head", softcaps=(None, None), full_every=6, overflows_float16=True)
_COHERE = replace(_ATTENTION_BIASED, norm="layer", norms=1, parallel=True, tied=True)
_OLMO2 = replace(_ATTENTION_BIASED, norm_place="after", qk_norm="all")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(window=4096),
    "qwen2": Family(qkv_bias=True, window=4096, window_opt_in=True),
    "qwen3": replace(_ATTENTION_BIASED, qk_norm="head", head_dim=128, window=4096, window_opt_in=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi": replace(
        _LAYER_NORM,
        norms=1,
        parallel=True,
        names=("dense", "fc1", "fc2"),
        head_bias=True,
        rotary=0.5,
        activation="gelu_new",
    ),
    "phi3": Family(fused=True, names=("o_proj", "gate_up_proj", "down_proj")),
    "gpt2": replace(
        _LAYER_NORM,
        grouped=False,
        fused=True,
        fused_name="c_attn",
        names=("c_proj", "c_fc", "c_proj"),
        tied=True,
        rotary=0.0,
        activation="gelu_new",
    ),
    "gpt_neox": replace(
        _LAYER_NORM,
        grouped=False,
        fused=True,
        parallel=True,
        fused_name="query_key_value",
        names=("dense", "dense_h_to_4h", "dense_4h_to_h"),
        qkv_bias=("attention_bias", True),
        out_bias=("attention_bias", True),
        rotary=0.25,
        activation="gelu",
    ),
    "opt": replace(
        _LAYER_NORM,
        grouped=False,
        names=("out_proj", "fc1", "fc2"),
        qkv_bias=("enable_bias", True),
        out_bias=("enable_bias", True),
        mlp_bias=("enable_bias", True),
        tied=True,
        rotary=0.0,
        extra_positions=2,
        activation="relu",
    ),
    "starcoder2": replace(
        _LAYER_NORM,
        names=("o_proj", "c_fc", "c_proj"),
        qkv_bias=("use_bias", True),
        out_bias=("use_bias", True),
        mlp_bias=("use_bias", True),
        tied=True,
        activation="gelu_pytorch_tanh",
    ),
    "granite": replace(_LLAMA, embedding_scale=True),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, window=4096, full_every=4),
    "olmo": replace(_ATTENTION_BIASED, norm="layer", norm_weights=False),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, window=4096, full_every=4),
    "smollm3": replace(_LLAMA, tied=True, window_opt_in=True),
}


def activation_of(config: Mapping[str, Any]) -> str | None:
    """Return the MLP's activation as the config names it; None where it does not."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((str(config[name]) for name in names if config.get(name)), None)


def family_of(model_type: str, config: Mapping[str, Any]) -> Family:
    """Return the family of a model type; an unknown one is taken for Llama's layout, gated when it uses SiLU."""
    if model_type in FAMILIES:
        family = FAMILIES[model_type]
        beside = config.get("use_parallel_residual", True) if model_type == "gpt_neox" else family.parallel
        return replace(family, parallel=bool(beside))
    gated = (activation_of(config) or "silu") in ("silu", "swish")
    names = _LLAMA.names if gated else ("o_proj", "up_proj", "down_proj")
    return replace(_LLAMA, gated=gated, names=names)


def block_linears(family: Family, config: Mapping[str, Any], *, heads: int, kv_heads: int, dim: int) -> list[Linear]:
    """Return the linear layers of one block, which are the ones that are quantized and take adapters."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    qkv, out, mlp = (_flag(value, config) for value in (family.qkv_bias, family.out_bias, family.mlp_bias))
    out_name, *mlp_names = family.names
    if family.fused:
        linears = [Linear(family.fused_name, hidden, (heads + 2 * kv_heads) * dim, qkv)]
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
    positions = 0
    if family.learned_positions:
        positions = (int(config["max_position_embeddings"]) + family.extra_positions) * hidden
    head_bias = int(config["vocab_size"]) if family.head_bias else 0
    return layers * (family.norms * norm + qk + biases) + norm + positions + head_bias


def _flag(value: Bias, config: Mapping[str, Any]) -> bool:
    return value if isinstance(value, bool) else bool(config.get(*value))


# Mamba multiplies with some weights directly, so that an adapter beside them would be without effect: not in all-linear
BYPASSED = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "dt_proj"))
