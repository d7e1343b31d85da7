"""Keys and values while decoding: each prompt's once, shared by its completions, and each completion's own.

The rows (live completions) lie in slots, a fixed number G' for each prompt, so that all queries of a prompt meet its
keys in one product. Where prompts have unequal numbers of rows left, the spare slots repeat a row and are never read.

Shapes: B prompts, R rows, G' slots a prompt, P longest prompt, room for so many completion tokens, d head size, nkv key
heads, rep query heads a key head.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lowmem_rlhf.engine.decode.native import KVCacheView
from lowmem_rlhf.engine.mixers import Mix, StateKey
from lowmem_rlhf.planning.limits import COMPLETION_BLOCK

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase


Pair = tuple[torch.Tensor, torch.Tensor]


class SharedPromptCache:
    """The attention context of decoding: one new token for each row, all rows at the same completion length.

    Args:
        prompts: per layer the prompts' keys and values, a list over prompts of (nkv, P_b, d) pairs; it is emptied.
        states: by layer the prompts' final states (B, ..), where layers pass a state on (see `engine.mixers`).
        lengths: tokens of the prompts.
        row_prompt: for each row the number of its prompt.
        device: where everything lies.
        limit: the most completion tokens that will be stored.
    """

    def __init__(
        self,
        prompts: dict[int, list[Pair]],
        states: dict[StateKey, torch.Tensor],
        lengths: Sequence[int],
        row_prompt: Sequence[int],
        device: torch.device,
        limit: int,
    ) -> None:
        self.device, self.limit, self.length = device, limit, 0
        self.lengths = list(lengths)
        # what is stacked is freed layer by layer, so that prompts are never there twice
        self._prompt = {layer: _pad_prompts(prompts.pop(layer)) for layer in list(prompts)}
        self._own: dict[int, Pair] = {}  # (B * nkv * G', d, room), (B * nkv * G', room, d)
        each = self._index(row_prompt)
        self._states = {key: states.pop(key).index_select(0, each) for key in list(states)}  # (R, ..)
        self._arrange(list(row_prompt))

    def _arrange(self, row_prompt: list[int]) -> None:
        """Give every row a slot and prepare what all layers share."""
        counts = [0] * len(self.lengths)
        slots: list[tuple[int, int]] = []
        for b in row_prompt:
            slots.append((b, counts[b]))
            counts[b] += 1
        self.row_prompt, self.slots, self.per_prompt = row_prompt, slots, max(counts)
        flat = [b * self.per_prompt + g for b, g in slots]
        self._to_slots: torch.Tensor | None = None
        self._from_slots: torch.Tensor | None = None
        if flat != list(range(len(counts) * self.per_prompt)):
            rows = [0] * (len(counts) * self.per_prompt)
            for row, place in enumerate(flat):
                rows[place] = row
            self._to_slots, self._from_slots = self._index(rows), self._index(flat)
        self.row_lengths = self._index([self.lengths[b] for b in row_prompt])  # (R,) prompt length of each row
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}  # of this token

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def advance(self) -> None:
        """Make room for one more completion token; to be called before each decoding pass."""
        self.length += 1
        self._masks.clear()

    def skip_to(self, length: int) -> None:
        """Be as after so many tokens of each completion, empty ones: to measure what the last one takes."""
        self.length = max(0, length)

    def next_states(self, base: "SharedBase", tokens: torch.Tensor) -> torch.Tensor:
        """Run one more token (R,) of each row through the model; return the last hidden states (R, H)."""
        positions = self.row_lengths + self.length
        self.advance()
        return base.next_hidden_states(tokens[None], positions[None], self)

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
        """See `AttentionContext.attend`; T is R, one token a row."""
        heads, _, d = q.shape
        kv_heads = k.shape[0]
        if self._to_slots is not None:
            q, k, v = (x.index_select(1, self._to_slots) for x in (q, k, v))
        own_k, own_v = self._store(layer, k, v)  # (B * nkv * G', d, room), (B * nkv * G', room, d)
        prompt_k, prompt_v = self._prompt[layer]  # (B * nkv, d, P), (B * nkv, P, d)
        prompts, longest = len(self.lengths), prompt_k.shape[-1]
        repeats = heads // kv_heads
        # scaled before the products: in float16 the product of large queries and keys would overflow
        slotted = (q * scaling).view(kv_heads, repeats, prompts, self.per_prompt, d).permute(2, 0, 3, 1, 4)
        slotted = slotted.reshape(prompts * kv_heads, self.per_prompt * repeats, d)  # (B * nkv, G' * rep, d)
        to_prompt = torch.bmm(slotted, prompt_k).view(-1, repeats, longest)
        to_own = torch.bmm(slotted.reshape(-1, repeats, d), own_k)
        scores = torch.cat([to_prompt, to_own], dim=-1)  # (B * nkv * G', rep, P + room)
        if softcap:
            scores = torch.tanh(scores.float() / softcap) * softcap
        if window is not None and window >= longest + self.length:
            window = None
        scores.view(prompts, -1, scores.shape[-1]).add_(self._mask(window, own_v.shape[1], scores.dtype))
        weights = scores.softmax(-1).to(v.dtype)  # a 16-bit softmax computes in fp32 and rounds its result
        of_prompt = weights[..., :longest].reshape(prompts * kv_heads, -1, longest)
        out = torch.bmm(of_prompt, prompt_v).view(-1, repeats, v.shape[-1])
        out = torch.baddbmm(out, weights[..., longest:], own_v)
        out = out.view(prompts, kv_heads, self.per_prompt, repeats, -1).transpose(1, 2).reshape(-1, heads, v.shape[-1])
        return out if self._from_slots is None else out.index_select(0, self._from_slots)

    def mix(self, key: StateKey, tensors: Sequence[torch.Tensor], mix: Mix) -> torch.Tensor:
        """See `AttentionContext.mix`; T is R, one token a row, and each row goes on from its own state."""
        out, self._states[key] = mix([x.transpose(0, 1) for x in tensors], self._states[key])
        return out.transpose(0, 1)

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Append one token's keys and values (nkv, B * G', d); return the whole room."""
        keys, values = held = self._room(layer)
        kv_heads, prompts = k.shape[0], len(self.lengths)
        slots = (prompts, kv_heads, self.per_prompt, -1)
        for place, new in ((keys[:, :, self.length - 1], k), (values[:, self.length - 1], v)):
            place.view(slots).copy_(new.view(kv_heads, prompts, self.per_prompt, -1).transpose(0, 1))
        return held

    def _room(self, layer: int) -> Pair:
        """Return a layer's own keys and values, with room for this token.

        Where there is none, room grows by a block, or an eighth of what there is, and what is held is copied.
        """
        held = self._own.get(layer)
        if held is not None and held[1].shape[1] >= self.length:
            return held
        step = COMPLETION_BLOCK * max(1, self.length // (8 * COMPLETION_BLOCK))
        room = min(self.limit, -(-self.length // step) * step)
        k, v = self._prompt[layer]
        rows = k.shape[0] * self.per_prompt
        keys = torch.zeros((rows, k.shape[1], room), dtype=k.dtype, device=k.device)
        values = torch.zeros((rows, room, v.shape[2]), dtype=v.dtype, device=v.device)
        if held is not None:
            keys[:, :, : held[0].shape[2]] = held[0]
            values[:, : held[1].shape[1]] = held[1]
        self._own[layer] = keys, values
        return keys, values

    def view(self) -> KVCacheView:
        """Return all keys and values, with room for this token, for code that attends by itself."""
        layers = [(*pair, *self._room(layer)) for layer, pair in sorted(self._prompt.items())]
        rows = [(b, g, self.lengths[b]) for b, g in self.slots]
        return KVCacheView(layers, rows, self.per_prompt, self.length)

    def stored(self, layer: int) -> Pair:
        """Return a layer's keys and values of this token, (R * nkv, d) each, as they were stored."""
        keys, values = self._room(layer)
        heads = keys.shape[0] // (len(self.lengths) * self.per_prompt)
        index = self._index([(b * heads + h) * self.per_prompt + g for b, g in self.slots for h in range(heads)])
        return keys[:, :, self.length - 1].index_select(0, index), values[:, self.length - 1].index_select(0, index)

    def _mask(self, window: int | None, room: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a summand (B, 1, P + room) that hides what is padding or outside the window; all layers share it."""
        key = (window, dtype)
        if key not in self._masks:
            longest = max(self.lengths)
            at = torch.arange(longest + room, dtype=torch.long, device=self.device)[None]
            lengths = self._index(self.lengths)[:, None]
            hidden = torch.where(at < longest, at >= lengths, at >= longest + self.length)  # (B, P + room)
            if window is not None:
                position = torch.where(at < longest, at, at - longest + lengths)
                hidden |= position < lengths + self.length - window
            zero = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            self._masks[key] = zero.masked_fill_(hidden, float("-inf"))[:, None]
        return self._masks[key]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (places in the present order), and the prompts that no row needs any more."""
        rest = self._index(rows)
        for key in list(self._states):
            self._states[key] = self._states[key].index_select(0, rest)
        row_prompt = [self.row_prompt[row] for row in rows]
        used = sorted(set(row_prompt))
        old_slots, old_count, old_per_prompt = [self.slots[row] for row in rows], len(self.lengths), self.per_prompt
        if len(used) < old_count:
            self.lengths = [self.lengths[b] for b in used]
            where, longest = self._index(used), max(self.lengths)
            for layer, (k, v) in self._prompt.items():
                kept_k = k.unflatten(0, (old_count, -1)).index_select(0, where)[..., :longest].flatten(0, 1)
                kept_v = v.unflatten(0, (old_count, -1)).index_select(0, where)[..., :longest, :].flatten(0, 1)
                self._prompt[layer] = (kept_k.contiguous(), kept_v.contiguous())
        place = {b: i for i, b in enumerate(used)}
        self._arrange([place[b] for b in row_prompt])
        source = [old_slots[0]] * (len(used) * self.per_prompt)
        for (b, g), old in zip(self.slots, old_slots, strict=True):
            source[b * self.per_prompt + g] = old
        for layer in list(self._own):
            pair = self._own.pop(layer)  # one at a time: the old rows are freed before the next layer's are copied
            kv_heads = pair[0].shape[0] // (old_count * old_per_prompt)
            index = self._index(
                [
                    (b * kv_heads + head) * old_per_prompt + g
                    for first in range(0, len(source), self.per_prompt)
                    for head in range(kv_heads)
                    for b, g in source[first : first + self.per_prompt]
                ]
            )
            self._own[layer] = (pair[0].index_select(0, index), pair[1].index_select(0, index))


def _pad_prompts(pairs: list[Pair]) -> Pair:
    """Stack prompts' keys and values (nkv, P_b, d), zeros behind the shorter ones: (B * nkv, d, P), (B * nkv, P, d)."""
    longest = max(k.shape[-2] for k, _ in pairs)
    keys, values = pairs[0]
    padded = []
    for x in (keys, values):
        shape = (len(pairs), x.shape[0], longest, x.shape[2])
        padded.append(torch.zeros(shape, dtype=x.dtype, device=x.device))
    for b, pair in enumerate(pairs):
        for target, x in zip(padded, pair, strict=True):
            target[b, :, : x.shape[-2]] = x
    k, v = (x.flatten(0, 1) for x in padded)
    return k.transpose(1, 2).contiguous(), v
