"""The decoder of Llama's shape, run without its modules: what is left of a decoding pass is its products.

Llama, Mistral, Qwen 2 and 3, SmolLM and their kin share one layer: norm, attention with rotary positions, norm, gated
MLP. While decoding a few rows, calling stock modules costs a good part of the pass. A model takes this path only if a
trial shows that it computes what its own modules compute; every other one keeps them.

Shapes: T rows, H hidden size, nh and nkv heads of size d.
"""

from dataclasses import dataclass
from typing import Any

import torch

from lowmem_rlhf.model.attention import AttentionContext, PackedContext
from lowmem_rlhf.model.fused import GATED_MLP
from lowmem_rlhf.model.native import NativeDecoder, native_decoder
from lowmem_rlhf.model.packing import Bucket
from lowmem_rlhf.model.siblings import Siblings

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
TRIAL_TOKENS = 6


class _Observed(PackedContext):
    """A context that notes with which scaling, window and soft cap each layer calls it."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        super().__init__([Bucket(0, 1, tokens, ())], device)
        self.seen: dict[int, tuple[float, int | None, float | None]] = {}

    def attend(self, layer: int, *args: Any) -> torch.Tensor:
        self.seen[layer] = args[3:]  # type: ignore[assignment]
        return super().attend(layer, *args)


@dataclass(frozen=True)
class LeanLayer:
    """One layer: its norms (as functions, and the modules), its products and how it attends."""

    attention_norm: Any
    mlp_norm: Any
    qkv: Siblings
    head_norms: tuple[Any, Any] | None
    out: Siblings
    gate_up: Siblings
    activation: Any
    down: Siblings
    norms: tuple[Any, Any]
    head_size: int
    kv_heads: int
    attention: tuple[float, int | None, float | None]


class LeanDecoder:
    """A pass without gradients for few rows; the same result as the stock decoder's, to rounding."""

    def __init__(self, decoder: Any, layers: list[LeanLayer]) -> None:
        self.decoder, self.layers = decoder, layers
        self._native: tuple[Any, NativeDecoder | None] = (None, None)  # with what it was made of
        self._natively: bool | None = None  # whether C computes the same; None: not tried yet

    def forget(self) -> None:
        """Let go of what was lent for decoding."""
        self._native = (None, None)

    @torch.no_grad()
    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return the last hidden states (T, H) for input_ids and position_ids (1, T), as SharedBase's."""
        x = self.decoder.embed_tokens(input_ids)
        cos, sin = (table[0][:, None] for table in self.decoder.rotary_emb(x, position_ids))  # (T, 1, d)
        sin = torch.cat((-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]), dim=-1)
        return self.decoder.norm(self._through_layers(x[0], cos, sin, context))

    def _through_layers(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return the last layer's result for embeddings x (T, H): by C where it computes the same, which is tried."""
        native = self._native_decoder(x, context)
        if native is None:
            return self._by_torch(x, cos, sin, context)
        want = self._by_torch(x, cos, sin, context) if self._natively is None else None
        got = x.clone()
        native.run(got, cos[:, 0].contiguous(), sin[:, 0].contiguous(), context.all_kept())  # type: ignore[attr-defined]
        if want is None:
            return got
        self._natively = _close(got, want, len(self.layers))
        # what is kept of this token is C's: were it the trial's, a resumed run would not be the uninterrupted one
        return got if self._natively else self._by_torch(x, cos, sin, context)

    def _native_decoder(self, x: torch.Tensor, context: AttentionContext) -> NativeDecoder | None:
        """Return the C decoder for so few rows of a rollout; None where there is none."""
        first = self.layers[0].qkv
        if self._natively is False or x.shape[0] > first.most_rows or not hasattr(context, "all_kept"):
            return None
        active = first.layers[0].active
        made_of = (first.together, active.names, active.version)
        if self._native[0] != made_of:
            self._native = (made_of, native_decoder(self.layers, x.dtype))
        return self._native[1]

    def _by_torch(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x + self._attention(number, layer, layer.attention_norm(x), cos, sin, context)
            gate, up = layer.gate_up.results(layer.mlp_norm(x))
            x += layer.down.joined(layer.activation(gate).mul_(up))
        return x

    def _attention(
        self,
        number: int,
        layer: LeanLayer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        context: AttentionContext,
    ) -> torch.Tensor:
        heads = layer.qkv.joined(x).unflatten(-1, (-1, layer.head_size))  # (T, nh + 2 nkv, d)
        nkv = layer.kv_heads
        turned, v = heads[:, :-nkv], heads[:, -nkv:]
        if layer.head_norms is not None:
            turned = torch.cat((layer.head_norms[0](turned[:, :-nkv]), layer.head_norms[1](turned[:, -nkv:])), dim=1)
        turned = _rotated(turned, cos, sin).transpose(0, 1)
        q, k = turned[:-nkv], turned[-nkv:]
        out = context.attend(number, q, k, v.transpose(0, 1), *layer.attention)
        return layer.out.joined(out.flatten(1))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn heads (T, heads, d) by their positions (RoFormer, arXiv 2104.09864; halves, as transformers has it).

    The first half of ``sin`` is negated: it belongs to what the second half of a head adds to the first.
    """
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)


@torch.no_grad()
def lean_decoder(base: Any) -> LeanDecoder | None:
    """Return the lean decoder of a SharedBase; None where its layers are of another shape or compute anything else."""
    decoder = base.decoder
    blocks = getattr(decoder, "layers", ())
    if not blocks or not {"embed_tokens", "norm", "rotary_emb"} <= {name for name, _ in decoder.named_children()}:
        return None
    ids = torch.arange(TRIAL_TOKENS, dtype=torch.long, device=base.device)[None]
    observed = _Observed(TRIAL_TOKENS, base.device)
    want = base.hidden_states(ids, ids, observed)
    layers = [_lean(block, observed.seen.get(i)) for i, block in enumerate(blocks)]
    if not all(layers):
        return None
    lean = LeanDecoder(decoder, layers)  # type: ignore[arg-type]
    got = lean.hidden_states(ids, ids, PackedContext([Bucket(0, 1, TRIAL_TOKENS, ())], base.device))
    return lean if _close(got, want, len(layers)) else None


def _close(got: torch.Tensor, want: torch.Tensor, layers: int) -> bool:
    """Say whether two results of so many layers differ by rounding only."""
    rounding = torch.finfo(want.dtype).eps * layers**0.5
    return bool((got - want).float().norm() <= 4 * rounding * want.float().norm())


def _lean(block: Any, attention: tuple[float, int | None, float | None] | None) -> LeanLayer | None:
    """Return a stock layer's parts if it has Llama's shape and its products are joined as expected."""
    if attention is None or {name for name, _ in block.named_children()} != PARTS:
        return None
    heads, mlp = block.self_attn, block.mlp
    norms = {name for name, _ in heads.named_children()} - ATTENTION
    if not all(hasattr(heads, name) for name in ATTENTION) or norms not in (set(), {"q_norm", "k_norm"}):
        return None
    if {name for name, _ in mlp.named_children()} != GATED_MLP:
        return None
    groups = [
        [heads.q_proj, heads.k_proj, heads.v_proj],
        [heads.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    joined = [getattr(group[0], "siblings", None) for group in groups]
    if any(s is None or s.layers != group for s, group in zip(joined, groups, strict=True)):
        return None
    return LeanLayer(
        attention_norm=block.input_layernorm.forward,
        mlp_norm=block.post_attention_layernorm.forward,
        qkv=joined[0],  # type: ignore[arg-type]
        head_norms=(heads.q_norm.forward, heads.k_norm.forward) if norms else None,
        out=joined[1],  # type: ignore[arg-type]
        gate_up=joined[2],  # type: ignore[arg-type]
        activation=mlp.act_fn,
        down=joined[3],  # type: ignore[arg-type]
        norms=(block.input_layernorm, block.post_attention_layernorm),
        head_size=heads.head_dim,
        kv_heads=heads.k_proj.out_features // heads.head_dim,
        attention=attention,
    )
