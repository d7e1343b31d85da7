"""The decoder of Llama's shape, run without its modules: what is left of a decoding pass is its products.

Llama, Mistral, Qwen 2 and 3, SmolLM and their kin share one layer: norm, attention with rotary positions, norm, gated
MLP. While decoding a few rows, calling stock modules costs a good part of the pass. A model takes this path only if a
trial shows that it computes what its own modules compute (`decode.trial`); every other one keeps them.

Shapes: T rows, H hidden size, nh and nkv heads of size d.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lowmem_rlhf.engine.attention import AttentionContext
from lowmem_rlhf.engine.decode.native import NativeDecoder, native_decoder
from lowmem_rlhf.engine.fused import GATED_MLP, gated_activation
from lowmem_rlhf.engine.grouped_lora import GroupedLoraLinear
from lowmem_rlhf.engine.trial import nudged, rows_within_noise

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@dataclass(frozen=True)
class FastDecoderLayer:
    """One layer: its norms (as functions, and the modules), its products and how it attends."""

    attention_norm: Any
    mlp_norm: Any
    qkv: GroupedLoraLinear
    head_norms: tuple[Any, Any] | None
    out: GroupedLoraLinear
    gate_up: GroupedLoraLinear
    activation: Any
    down: GroupedLoraLinear
    norms: tuple[Any, Any]
    mlp: Any
    head_size: int
    kv_heads: int
    attention: tuple[float, int | None, float | None]

    def run(
        self, number: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return the layer's result (T, H) for its input x (T, H); ``number`` is its place among the layers."""
        x = x + self._attention(number, self.attention_norm(x), cos, sin, context)
        gate, up = self.gate_up.results(self.mlp_norm(x))
        x += self.down.concatenated(self.activation(gate).mul_(up))
        return x

    def _attention(
        self, number: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        heads = self.qkv.concatenated(x).unflatten(-1, (-1, self.head_size))  # (T, nh + 2 nkv, d)
        nkv = self.kv_heads
        turned, v = heads[:, :-nkv], heads[:, -nkv:]
        if self.head_norms is not None:
            turned = torch.cat((self.head_norms[0](turned[:, :-nkv]), self.head_norms[1](turned[:, -nkv:])), dim=1)
        turned = _rotated(turned, cos, sin).transpose(0, 1)
        q, k = turned[:-nkv], turned[-nkv:]
        out = context.attend(number, q, k, v.transpose(0, 1), *self.attention)
        return self.out.concatenated(out.flatten(1))


class FastDecoder:
    """A pass without gradients for few rows; the same result as the stock decoder's, to rounding."""

    def __init__(self, decoder: Any, layers: list[FastDecoderLayer]) -> None:
        self.decoder, self.layers = decoder, layers
        self._native: tuple[Any, NativeDecoder | None] = (None, None)  # with what it was made of
        self._natively: bool | None = None  # whether C computes the same; None: not tried yet

    def forget(self) -> None:
        """Let go of the weights' form for decoding."""
        self._native = (None, None)

    @torch.no_grad()
    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return the last hidden states (T, H) for input_ids and position_ids (1, T), as SharedBase's."""
        x = self.decoder.embed_tokens(input_ids)
        known = getattr(context, "rotary_tables", None)
        cos, sin = rotary_tables(self.decoder, x, position_ids) if known is None else known()
        return self.decoder.norm(self._through_layers(x[0], cos, sin, context))

    def _through_layers(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return the last layer's result for embeddings x (T, H): by C where it computes the same, which is tried."""
        native = self._native_decoder(x, context)
        if native is not None and self._natively is None:
            self._natively = self._computes_the_same(native, x, cos, sin, context)
        if native is not None and self._natively:
            # after a trial too, which kept torch's keys: a resumed run would not be the uninterrupted one otherwise
            got, cache = x.clone(), context.view()  # type: ignore[attr-defined]
            native.run(got, cos[:, 0].contiguous(), sin[:, 0].contiguous(), cache)
            return got
        for number, layer in enumerate(self.layers):
            x = layer.run(number, x, cos, sin, context)
        return x

    def _native_decoder(self, x: torch.Tensor, context: AttentionContext) -> NativeDecoder | None:
        """Return the C decoder for so few rows of a rollout; None where there is none."""
        first = self.layers[0].qkv
        if self._natively is False or x.shape[0] > first.max_decode_rows or not hasattr(context, "view"):
            return None
        active = first.layers[0].active
        made_of = (first.decode_product, active.names, active.version)
        if self._native[0] != made_of:
            self._native = (made_of, native_decoder(self.layers, x.dtype))
        return self._native[1]

    def _computes_the_same(
        self, native: NativeDecoder, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, context: Any
    ) -> bool:
        """Hold every layer in C against torch's operations: its result, and the keys and values that it stores.

        Both get the same input, so that no difference hides behind those of other layers. The bound is how far torch's
        own result moves when its input does by one rounding.
        """
        tables = cos[:, 0].contiguous(), sin[:, 0].contiguous()
        for number, layer in enumerate(self.layers):
            torchs = []
            for moved in (x, nudged(x)):
                result = layer.run(number, moved, cos, sin, context)
                torchs.append((result, *(one.clone() for one in context.stored(number))))
            got = x.clone()
            native.run(got, *tables, context.view(), only=number)
            adds_to = (x, *torchs[0][1:])  # a result adds to the layer's input; keys and values stand by themselves
            results = zip((got, *context.stored(number)), *torchs, adds_to, strict=True)
            if not all(rows_within_noise(*one) for one in results):
                return False
            x = torchs[0][0]
        return True


def rotary_tables(decoder: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a decoder's cosines and sines (T, 1, d) for positions (1, T) in x's dtype (see `FastDecoderLayer.run`).

    The first half of the sines is negated (`_rotated`).
    """
    cos, sin = (table[0][:, None] for table in decoder.rotary_emb(x, position_ids))
    half = sin.shape[-1] // 2
    return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn heads (T, heads, d) by their positions (RoFormer, arXiv 2104.09864; halves, as transformers has it).

    The first half of ``sin`` is negated: it belongs to what the second half of a head adds to the first.
    """
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)


def fast_layer(block: Any, attention: tuple[float, int | None, float | None] | None) -> FastDecoderLayer | None:
    """Return a stock layer's parts if it has the parts of Llama's and its products are grouped as expected.

    Args:
        attention: the scaling, window and soft cap with which it attends; None: it was not seen to.
    """
    if attention is None or {name for name, _ in block.named_children()} != PARTS:
        return None
    heads, mlp = block.self_attn, block.mlp
    norms = {name for name, _ in heads.named_children()} - ATTENTION
    if not all(hasattr(heads, name) for name in ATTENTION) or norms not in (set(), {"q_norm", "k_norm"}):
        return None
    activation = gated_activation(mlp)  # the form of the MLP is known where it took the fused forward
    if activation is None or {name for name, _ in mlp.named_children()} != GATED_MLP:
        return None
    groups = [
        [heads.q_proj, heads.k_proj, heads.v_proj],
        [heads.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    grouped = [getattr(group[0], "group", None) for group in groups]
    if any(s is None or s.layers != group for s, group in zip(grouped, groups, strict=True)):
        return None
    return FastDecoderLayer(
        attention_norm=block.input_layernorm.forward,
        mlp_norm=block.post_attention_layernorm.forward,
        qkv=grouped[0],  # type: ignore[arg-type]
        head_norms=(heads.q_norm.forward, heads.k_norm.forward) if norms else None,
        out=grouped[1],  # type: ignore[arg-type]
        gate_up=grouped[2],  # type: ignore[arg-type]
        activation=activation[0],
        down=grouped[3],  # type: ignore[arg-type]
        norms=(block.input_layernorm, block.post_attention_layernorm),
        mlp=mlp,
        head_size=heads.head_dim,
        kv_heads=heads.k_proj.out_features // heads.head_dim,
        attention=attention,
    )
