"""Keys and values while decoding: each prompt's once, shared by its completions, and each completion's own.

Shapes: B prompts, R rows (live completions), P longest prompt, C room for completion tokens, d head size.
"""

from collections.abc import Sequence

import torch

BLOCK = 32  # the room for completion tokens grows by at least this many


class SharedPromptCache:
    """The attention context of decoding: one new token for each row, all rows at the same completion length.

    Args:
        prompts: per layer the prompts' keys and values, a list over prompts of (nkv, P_b, d) pairs.
        row_prompt: for each row the number of its prompt.
        device: where everything lies.
        limit: the most completion tokens that will be stored.
    """

    def __init__(
        self,
        prompts: dict[int, list[tuple[torch.Tensor, torch.Tensor]]],
        row_prompt: Sequence[int],
        device: torch.device,
        limit: int,
    ) -> None:
        self.device, self.limit, self.length = device, limit, 0
        some = next(iter(prompts.values()))
        self.lengths = [k.shape[-2] for k, _ in some]
        self._prompt = {layer: _pad_prompts(pairs) for layer, pairs in prompts.items()}
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._arrange(list(row_prompt))

    def _arrange(self, row_prompt: list[int]) -> None:
        """Lay the rows out as (B, G') slots, so that a prompt's rows meet its keys in one product."""
        counts = [0] * len(self.lengths)
        slot: list[int] = []
        for b in row_prompt:
            slot.append(counts[b])
            counts[b] += 1
        self.row_prompt, self._per_prompt = row_prompt, max(counts, default=0)
        flat = [b * self._per_prompt + s for b, s in zip(row_prompt, slot, strict=True)]
        even = all(c == self._per_prompt for c in counts) and flat == list(range(len(flat)))
        self._to_slots: torch.Tensor | None = None
        self._from_slots: torch.Tensor | None = None
        if not even:
            rows = [0] * (len(counts) * self._per_prompt)
            for row, place in enumerate(flat):
                rows[place] = row
            self._to_slots = torch.tensor(rows, dtype=torch.long, device=self.device)
            self._from_slots = torch.tensor(flat, dtype=torch.long, device=self.device)
        longest = max(self.lengths)
        self._hidden: torch.Tensor | None = None
        if any(n < longest for n in self.lengths):
            at = torch.arange(longest, device=self.device)
            lengths = torch.tensor(self.lengths, dtype=torch.long, device=self.device)
            self._hidden = at[None] >= lengths[:, None]  # (B, P): behind the prompt's end

    @property
    def row_lengths(self) -> torch.Tensor:
        """The prompt length of each row, (R,)."""
        return torch.tensor([self.lengths[b] for b in self.row_prompt], dtype=torch.long, device=self.device)

    def advance(self) -> None:
        """Make room for one more completion token; to be called before each decoding pass."""
        self.length += 1

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
        own_k, own_v = self._store(layer, k, v)  # (R, nkv, t, d)
        heads, rows, d = q.shape
        kv_heads = k.shape[0]
        q = q.transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, d) * scaling  # (R, nkv, rep, d)
        scores = torch.cat([self._prompt_scores(layer, q), (q @ own_k.transpose(-1, -2)).float()], dim=-1)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        self._mask(scores, window)
        weights = scores.softmax(-1).to(v.dtype)  # (R, nkv, rep, P + t)
        longest = max(self.lengths)
        out = self._prompt_values(layer, weights[..., :longest]) + weights[..., longest:] @ own_v
        return out.reshape(rows, heads, d)

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = self.length
        held = self._own.get(layer)
        if held is None or held[0].shape[-2] < t:
            room = min(self.limit, max(BLOCK, t + t // 2))
            shape = (k.shape[1], k.shape[0], room, k.shape[2])
            grown = (
                torch.zeros(shape, dtype=k.dtype, device=k.device),
                torch.zeros(shape, dtype=v.dtype, device=v.device),
            )
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[:, :, : old.shape[-2]] = old
            held = self._own[layer] = grown
        held[0][:, :, t - 1] = k.transpose(0, 1)
        held[1][:, :, t - 1] = v.transpose(0, 1)
        return held[0][:, :, :t], held[1][:, :, :t]

    def _prompt_scores(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Scores of the rows against their prompts' keys, (R, nkv, rep, P) fp32."""
        repeats = q.shape[2]
        slots = q if self._to_slots is None else q.index_select(0, self._to_slots)
        slots = slots.unflatten(0, (len(self.lengths), -1)).transpose(1, 2).flatten(2, 3)  # (B, nkv, G'*rep, d)
        scores = (slots @ self._prompt[layer][0].transpose(-1, -2)).float()  # (B, nkv, G'*rep, P)
        if self._hidden is not None:
            scores = scores.masked_fill_(self._hidden[:, None, None], float("-inf"))
        return self._rows(scores, repeats)

    def _prompt_values(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        """Weighted prompt values, (R, nkv, rep, d)."""
        repeats = weights.shape[2]
        slots = weights if self._to_slots is None else weights.index_select(0, self._to_slots)
        slots = slots.unflatten(0, (len(self.lengths), -1)).transpose(1, 2).flatten(2, 3)
        return self._rows(slots @ self._prompt[layer][1], repeats)

    def _rows(self, slots: torch.Tensor, repeats: int) -> torch.Tensor:
        """Bring (B, nkv, G' * rep, x) back to rows (R, nkv, rep, x)."""
        rows = slots.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1)
        return rows if self._from_slots is None else rows.index_select(0, self._from_slots)

    def _mask(self, scores: torch.Tensor, window: int | None) -> None:
        """Hide keys further back than the sliding window; scores (R, nkv, rep, P + t) in place."""
        longest, t = max(self.lengths), self.length
        if window is None or window >= longest + t:
            return
        at = torch.arange(longest + t, device=self.device)[None]
        lengths = self.row_lengths[:, None]
        position = torch.where(at < longest, at, at - longest + lengths)  # (R, P + t)
        hidden = position <= lengths + t - 1 - window
        scores.masked_fill_(hidden[:, None, None], float("-inf"))

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (places in the present order), and the prompts that no row needs any more."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        for layer in list(self._own):
            k, v = self._own.pop(layer)
            self._own[layer] = (k.index_select(0, index), v.index_select(0, index))
        row_prompt = [self.row_prompt[row] for row in rows]
        used = sorted(set(row_prompt))
        if len(used) < len(self.lengths):
            lengths = [self.lengths[b] for b in used]
            where = torch.tensor(used, dtype=torch.long, device=self.device)
            for layer in list(self._prompt):
                k, v = self._prompt.pop(layer)
                longest = max(lengths)
                self._prompt[layer] = (
                    k.index_select(0, where)[:, :, :longest],
                    v.index_select(0, where)[:, :, :longest],
                )
            self.lengths = lengths
        place = {b: i for i, b in enumerate(used)}
        self._arrange([place[b] for b in row_prompt])


def _pad_prompts(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack prompts' keys and values (nkv, P_b, d) to (B, nkv, P, d), zeros behind the shorter ones."""
    longest = max(k.shape[-2] for k, _ in pairs)
    keys, values = pairs[0]
    shape = (len(pairs), keys.shape[0], longest, keys.shape[2])
    out = (
        torch.zeros(shape, dtype=keys.dtype, device=keys.device),
        torch.zeros(shape, dtype=values.dtype, device=values.device),
    )
    for b, pair in enumerate(pairs):
        for target, x in zip(out, pair, strict=True):
            target[b, :, : x.shape[-2]] = x
    return out
