"""What the blocks of a model consist of: the terms that its memory is planned with. No torch here.

The defaults are Llama's; a family's row says how its blocks depart from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block, as peft names it; ``inputs`` x ``outputs`` weights and ``outputs`` biases if any."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


Flag = bool | tuple[str, bool]  # always, never, or as the named config field says, with its default


@dataclass(frozen=True)
class Block:
    """How a family's blocks depart from Llama's.

    Attributes:
        norm: RMSNorm, or LayerNorm.
        norms: norm vectors of ``hidden_size`` in a block.
        norm_place: whether attention and MLP are normed before, after, or on both sides.
        norm_bias: whether norms have a bias too (LayerNorm).
        norm_weights: whether norms have weights at all (OLMo's do not).
        qk_norm: norms of queries and keys: none, over each head's dimension, or over all heads.
        value_norm: values are normed as well (Gemma 4).
        qkv_bias, out_bias, mlp_bias: see `Flag`.
        gated: gate and up projections (SwiGLU) instead of one.
        fused: query, key and value in one layer, gate and up in one.
        keeps_gate: the activated gate is kept for the backward pass: the MLP's parts are called otherwise than Llama's,
            so that `engine.fused` passes it by.
        gated_attention: attention's result is multiplied with a gate, which comes with the queries.
        wide_norms: norms add one to their weights in fp32, as Gemma's do.
        parallel: attention and MLP work on the block's input side by side (see `Flag`).
        grouped: fewer key and value heads than query heads are possible.
        names: of the layers: attention output, then MLP in order.
        fused_name: of the query, key and value layer where they are one.
        path, attention, mlp: what the model calls the list of its blocks, and a block these parts of it (empty: the
            layers of the MLP lie in the block itself).
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
    """

    norm: Literal["rms", "layer"] = "rms"
    norms: int = 2
    norm_place: Literal["before", "after", "both"] = "before"
    norm_bias: bool = False
    norm_weights: bool = True
    qk_norm: Literal["none", "head", "all"] = "none"
    value_norm: bool = False
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    gated: bool = True
    fused: bool = False
    keeps_gate: bool = False
    gated_attention: bool = False
    wide_norms: bool = False
    parallel: Flag = False
    grouped: bool = True
    names: tuple[str, ...] = ("o_proj", "gate_proj", "up_proj", "down_proj")
    fused_name: str = "qkv_proj"
    path: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
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

    @property
    def learned_positions(self) -> bool:
        """Whether positions are a table that is added to the embedding (GPT-2, OPT)."""
        return self.rotary == 0


def activation_of(config: Mapping[str, Any]) -> str | None:
    """Return the MLP's activation as the config names it; None where it does not."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((str(config[name]) for name in names if config.get(name)), None)


def block_linears(block: Block, config: Mapping[str, Any], *, heads: int, kv_heads: int, dim: int) -> list[Linear]:
    """Return the linear layers of one block, which are the ones that are quantized and take adapters."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    qkv, out, mlp = (flag(value, config) for value in (block.qkv_bias, block.out_bias, block.mlp_bias))
    out_name, *mlp_names = block.names
    if block.fused:
        linears = [Linear(block.fused_name, hidden, (heads + 2 * kv_heads) * dim, qkv)]
    else:
        widths = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        linears = [Linear(name, hidden, count * dim, qkv) for name, count in widths.items()]
    linears.append(Linear(out_name, heads * dim, hidden, out))
    up = 2 * inner if block.fused and block.gated else inner
    linears += [Linear(name, hidden, up, mlp) for name in mlp_names[:-1]]
    return [*linears, Linear(mlp_names[-1], inner, hidden, mlp)]


def module_names(block: Block, linears: Sequence[Linear]) -> list[str]:
    """Return what `block_linears` are called inside their block, such as self_attn.q_proj."""
    names = [linear.name for linear in linears]
    last = names.index(block.names[0]) if block.names[0] in names else len(names) - len(block.names)
    parts = [block.attention if place <= last else block.mlp for place in range(len(names))]
    return [f"{part}.{linear.name}".lstrip(".") for part, linear in zip(parts, linears, strict=True)]


def other_parameters(
    block: Block, config: Mapping[str, Any], linears: list[Linear], *, heads: int, kv_heads: int, dim: int
) -> int:
    """Count what is in no linear weight and no embedding: norms, biases and learned positions."""
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    norm = hidden * (int(block.norm_weights) + int(block.norm_bias))
    qk = {"none": 0, "head": 2 * dim, "all": (heads + kv_heads) * dim}[block.qk_norm]
    biases = sum(linear.outputs for linear in linears if linear.bias)
    positions = 0
    if block.learned_positions:
        positions = (int(config["max_position_embeddings"]) + block.extra_positions) * hidden
    head_bias = int(config["vocab_size"]) if block.head_bias else 0
    return layers * (block.norms * norm + qk + biases) + norm + positions + head_bias


def flag(value: Flag, config: Mapping[str, Any]) -> bool:
    """Return what a flag is in a model with this config."""
    return value if isinstance(value, bool) else bool(config.get(*value))
