"""The attention function that stock transformers models call: packed passes and decoding with shared prompts.

Registered as ``lowmem`` in transformers' AttentionInterface. For an unregistered mask name transformers builds no
mask; what each token may see follows from the context object that comes along as a keyword argument of the model's
forward. Everything is plain SDPA or matmul, so nothing here needs more than a Turing card. Key and value heads are
expanded by hand: ``enable_gqa`` silently takes the math kernel there.

Shapes: q (1, nh, T, d); k (1, nkv, T, d); v (1, nkv, T, dv); result (1, T, nh, dv). Mostly dv is d; where keys and
values come from one compressed state (DeepSeek's latent attention) it is another width.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from lowmem_rlhf.engine.mixers import Mix, StateKey
from lowmem_rlhf.engine.packing import Bucket
from lowmem_rlhf.hardware.capabilities import CAPABILITIES
from lowmem_rlhf.planning.limits import CAPPED_SCORES, EXPLICIT_KEYS

NAME = "lowmem"
# kinds of devices on which explicit scores are faster, up to `EXPLICIT_KEYS` keys
EXPLICIT_ON = {kind for kind, can in CAPABILITIES.items() if can.explicit_scores}


# what stock models hand to an attention function beside what it computes with, and what it need not read
READ_ELSEWHERE = {"position_ids", "cache_position", "position_embeddings"}


class NotPackable(RuntimeError):
    """A model's attention is of a kind that cannot be packed; the message says of which, as the end of a sentence."""


class AttentionContext(Protocol):
    """What decides which keys a query sees."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return (T, nh, dv) for q (nh, T, d), k (nkv, T, d) and v (nkv, T, dv) of one layer."""
        ...

    def mix(self, key: StateKey, tensors: Sequence[torch.Tensor], mix: Mix) -> torch.Tensor:
        """Return (1, T, ..) for (1, T, ..) tensors of a layer that passes a state on (see `mixers`)."""
        ...


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    lowmem_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if lowmem_context is None:
        raise NotPackable("its layers do not hand on what its attention is called with")
    if attention_mask is not None:
        raise NotPackable("its attention makes a mask of its own")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise NotPackable("its attention is not causal")
    if other := sorted(k for k, v in kwargs.items() if torch.is_tensor(v) and k not in READ_ELSEWHERE):
        raise NotPackable(f"its attention takes {' and '.join(other)} as well")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    if query.dtype != value.dtype:  # turned in the fp32 of the residual stream (`engine.wide`)
        query, key = query.to(value.dtype), key.to(value.dtype)
    out = lowmem_context.attend(layer, query[0], key[0], value[0], scaling, sliding_window, softcap)
    return out[None].contiguous(), None


AttentionInterface.register(NAME, _attention)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return the (queries, keys) boolean mask in which the last query sees the last key, within ``window`` keys."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
    return mask.triu_(keys - queries - window + 1) if window is not None and window < keys else mask


def expand_heads(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Repeat key or value heads (.., nkv, T, d) to (.., nkv * repeats, T, d) for grouped-query attention."""
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=-3)


MASK_ALIGNMENT = 8  # numbers


def why_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> str:
    """Return why SDPA would leave q, k, v (B, heads, .., d) to its math kernel on a card; empty: it does not.

    The math kernel makes every score. The memory-efficient one, which Turing has as well, wants what
    ``can_use_mem_efficient_attention`` of ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`` checks: as many key
    heads as query heads, and heads whose numbers lie side by side, in 16 bits a multiple of 8 of them
    (``minimum_gemm_alignment``). Of a mask ``preprocess_mask`` of ``attention.cpp`` makes a copy for each call where
    its rows do not begin a multiple of 8 numbers apart.
    """
    if not q.shape[1] == k.shape[1] == v.shape[1]:
        return f"{q.shape[1]} query heads meet {k.shape[1]} key heads"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the numbers of a head do not lie side by side"
    if q.element_size() == 2 and any(x.shape[-1] % 8 for x in (q, v)):
        return f"heads of {q.shape[-1]} and {v.shape[-1]} numbers are no multiples of 8"
    if mask is not None and mask.dtype != q.dtype:
        return f"the mask is {mask.dtype}, queries are {q.dtype}"
    if mask is not None and (mask.stride(-1) != 1 or any(step % MASK_ALIGNMENT for step in mask.stride()[:-1])):
        return "the mask is copied for each call"
    return ""


class PackedContext:
    """Prompts attend causally to themselves; a completion attends to its prompt and, causally, to itself.

    Layers that pass a state on begin a completion with the state in which they leave its prompt.

    With ``keep`` the keys and values of every layer are kept for decoding, as (nkv, T, d) in ``kept[layer]``, and the
    prompts' final states in ``states``, in the order of the prompts in the row.

    Raises:
        NotPackable: with ``keep``, a layer attends twice in one pass, and would need two caches.
    """

    def __init__(self, buckets: Sequence[Bucket], device: torch.device, keep: bool = False) -> None:
        self.buckets = buckets
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = {} if keep else None
        self.windows: dict[int, int | None] = {}  # of the layers that are kept
        self.states: dict[StateKey, torch.Tensor] = {}
        self._index = [_pad_index(bucket.completions, device) for bucket in buckets]
        self._sizes = [size for b in buckets for size in (b.count * b.prompt, sum(b.completions))]
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See `AttentionContext.attend`."""
        if self.kept is not None:
            if layer in self.kept:
                raise NotPackable("a layer of it attends more than once for a token")
            self.windows[layer] = window
            self.kept[layer] = (k.detach(), v.detach())
        pieces: list[torch.Tensor] = []
        # one split, whose backward is one concatenation; slices would each fill a whole row with zeros
        parts = zip(*(x.split(self._sizes, dim=1) for x in (q, k, v)), strict=True)
        for bucket, index in zip(self.buckets, self._index, strict=True):
            qp, kp, vp = (x.unflatten(1, (bucket.count, -1)).transpose(0, 1) for x in next(parts))  # (n, heads, P, d)
            pieces.append(_flatten(self._sdpa(qp, kp, vp, scaling, window, softcap)))
            own = next(parts)
            if index is None:
                continue
            gather, scatter = index
            rows = len(bucket.completions)
            qo, ko, vo = (_pad(x, gather, rows) for x in own)  # (n * G, heads, C, d)
            keys = torch.cat([_each(kp, rows // bucket.count), ko], dim=-2)
            values = torch.cat([_each(vp, rows // bucket.count), vo], dim=-2)
            flat = _flatten(self._sdpa(qo, keys, values, scaling, window, softcap))
            pieces.append(flat if scatter is None else flat.index_select(0, scatter))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def mix(self, key: StateKey, tensors: Sequence[torch.Tensor], mix: Mix) -> torch.Tensor:
        """See `AttentionContext.mix`. Padding stands behind a completion's tokens, and no state is read there."""
        pieces: list[torch.Tensor] = []
        finals: list[torch.Tensor] = []
        parts = zip(*(x.split(self._sizes, dim=1) for x in tensors), strict=True)
        for bucket, index in zip(self.buckets, self._index, strict=True):
            out, state = mix([x[0].unflatten(0, (bucket.count, -1)) for x in next(parts)], None)
            pieces.append(out.flatten(0, 1))
            finals.append(state)
            own = next(parts)
            if index is None:
                continue
            gather, scatter = index
            rows = len(bucket.completions)
            padded = [(x[0] if gather is None else x[0].index_select(0, gather)).unflatten(0, (rows, -1)) for x in own]
            flat = mix(padded, state)[0].flatten(0, 1)
            pieces.append(flat if scatter is None else flat.index_select(0, scatter))
        if self.kept is not None:
            self.states[key] = torch.cat(finals).detach()
        return torch.cat(pieces)[None] if len(pieces) > 1 else pieces[0][None]

    def _sdpa(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Causal attention of q (B, nh, Q, d) over k, v (B, nkv, K, d), aligned at the end; returns (B, nh, Q, d)."""
        queries, keys = q.shape[-2], k.shape[-2]
        if softcap:
            return _Capped.apply(q, k, v, scaling, self._mask(queries, keys, window, q), softcap)
        if q.device.type in EXPLICIT_ON and keys <= EXPLICIT_KEYS:
            return _explicit(q, k, v, scaling, self._mask(queries, keys, window, q), None)
        repeats = q.shape[1] // k.shape[1]
        k, v = expand_heads(k, repeats), expand_heads(v, repeats)
        if queries == keys and (window is None or window >= keys):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(queries, keys, window, q), scale=scaling)

    def _mask(self, queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """The causal mask as a summand in q's dtype; all layers share it."""
        key = (queries, keys, window)
        if key not in self._masks:
            allowed = causal_mask(queries, keys, window, like.device)
            wide = -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT  # see `why_math`
            zero = torch.zeros((queries, wide), dtype=like.dtype, device=like.device)[:, :keys]
            self._masks[key] = zero.masked_fill_(~allowed, float("-inf"))
        return self._masks[key]


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, mask: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Attention with its score matrix, exponentials and sums in fp32; as `PackedContext._sdpa`."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = (q * scaling).reshape(batch, kv_heads, -1, q.shape[-1])  # the query heads of a key head side by side
    scores = (grouped @ k.transpose(-1, -2)).view(batch, kv_heads, -1, queries, keys)
    if softcap:
        scores = torch.tanh(scores.float() / softcap) * softcap
    weights = scores.add_(mask).softmax(-1).to(v.dtype)  # a 16-bit softmax computes in fp32 and rounds its result
    return (weights.view(batch, kv_heads, -1, keys) @ v).view(batch, heads, queries, -1)


class _Capped(torch.autograd.Function):
    """`_explicit` with a soft cap, which no SDPA kernel has: a few rows at a time, and scores made again for backward.

    Of all scores, fp32 and rounded, there are `CAPPED_SCORES` at once (or those of one row); q, k and v are kept.
    """

    @staticmethod
    def forward(ctx, q, k, v, scaling, mask, softcap):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, mask)
        ctx.scaling, ctx.softcap = scaling, softcap
        parts = _row_parts(q, k, v)
        return torch.cat([_explicit(qi, ki, vi, scaling, mask, softcap) for qi, ki, vi in parts])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        *saved, mask = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in saved]
        for *inputs, outer, a, b, c in _row_parts(*saved, grad, *grads):
            with torch.enable_grad():
                qi, ki, vi = (x.detach().requires_grad_() for x in inputs)
                out = _explicit(qi, ki, vi, ctx.scaling, mask, ctx.softcap)
                found = torch.autograd.grad(out, (qi, ki, vi), outer)
            del out
            for place, one in zip((a, b, c), found, strict=True):
                place.copy_(one)
        return *grads, None, None, None


def _row_parts(*rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut tensors that begin with q (B, nh, Q, d) and k (B, nkv, K, d) along B: their scores stay within the bound."""
    scores = rows[0].shape[1] * rows[0].shape[2] * rows[1].shape[2]
    return zip(*(x.split(max(1, CAPPED_SCORES // scores)) for x in rows), strict=True)


def _flatten(x: torch.Tensor) -> torch.Tensor:
    """Turn (B, nh, T, d) into tokens (B * T, nh, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _each(x: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each of n prompts' keys or values (n, nkv, P, d) for its completions: (n * times, nkv, P, d)."""
    return x[:, None].expand(-1, times, -1, -1, -1).flatten(0, 1)


def _pad(x: torch.Tensor, gather: torch.Tensor | None, rows: int) -> torch.Tensor:
    """Turn packed completions (nh, S, d) into padded rows (rows, nh, C, d); padding is any token, it is never seen."""
    if gather is not None:
        x = x.index_select(1, gather)
    return x.unflatten(1, (rows, -1)).transpose(0, 1)


def _pad_index(lengths: Sequence[int], device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """Return the indices packed -> padded (rows * C,) and padded -> packed (S,); None for each that is the identity.

    Padding stands behind a row's tokens, where causality hides it from all of them.
    """
    longest = max(lengths, default=0)
    if longest == 0:
        return None
    if all(n == longest for n in lengths):
        return None, None
    gather: list[int] = []
    scatter: list[int] = []
    start = 0
    for row, n in enumerate(lengths):
        gather += [*range(start, start + n), *([0] * (longest - n))]
        scatter += range(row * longest, row * longest + n)
        start += n
    return (
        torch.tensor(gather, dtype=torch.long, device=device),
        torch.tensor(scatter, dtype=torch.long, device=device),
    )
