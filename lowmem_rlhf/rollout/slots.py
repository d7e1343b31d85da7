"""Slots of fixed shape: what a decoding pass reads and writes when it is to be captured once and replayed.

A slot holds one completion that is being written: its keys and values (the prompt's first), its next token, where it
stands, the uniform numbers of its tokens, and what else its draws need (`rollout.draws`). All of it stays at one place
in the device's memory and nothing of a pass depends on a number that the host knows, so a pass can be a graph. Slots
may be at different lengths: what a row sees follows from its own position.

Shapes: S slots, of which the first n run; room tokens in a slot, of which a pass sees the first ``seen``; d head size,
nh and nkv heads; V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lowmem_rlhf.engine.decode.fast_decoder import rotary_tables
from lowmem_rlhf.engine.mixers import Mix, StateKey
from lowmem_rlhf.planning.limits import LOOK
from lowmem_rlhf.rollout.draws import SlotDraws
from lowmem_rlhf.rollout.sampling import Sampling

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase

ROUNDING = 0.05  # of a log-prob, at most
REST = LOOK + 1  # the position of a slot at rest: as many records lie before it as are looked at
WORDS = 4  # of 4 bytes, in a record: a token (8 bytes), its log-prob, and nothing


class Slots:
    """The attention context of a pass over slots, and all that the pass reads and writes.

    A record is one token that was drawn and its log-prob. The one drawn when the token at position p was fed lies at p.

    Args:
        base: the base that decodes.
        count: S.
        room: tokens in a slot, a multiple of 8 (see `attend`).
        sampling: how tokens are drawn.
        tile: rows in one logits tile.
    """

    def __init__(self, base: "SharedBase", count: int, room: int, sampling: Sampling, tile: int) -> None:
        self.base, self.count, self.room, self.sampling = base, count, room, sampling
        self._draws = SlotDraws(base, count, sampling, tile)
        self.rows, self.seen = count, room
        device = base.device
        self._keys: dict[int, torch.Tensor] = {}  # by layer, (S, room, nkv, d)
        self._values: dict[int, torch.Tensor] = {}
        self._states: dict[StateKey, torch.Tensor] = {}  # (S, ..)
        # (2, S): the position of the token that is fed next, and its place among all slots' tokens
        self._places = torch.zeros((2, count), dtype=torch.long, device=device)
        self._steps = torch.zeros((2, count), dtype=torch.long, device=device)  # what a pass adds to them; at rest 0
        self._uniforms = torch.zeros((count * room,), dtype=torch.float32, device=device)
        self._records = torch.zeros((count * room, WORDS), dtype=torch.float32, device=device)
        self._record = torch.zeros((count, WORDS), dtype=torch.float32, device=device)  # the last one of each slot
        self._masks: dict[int | None, torch.Tensor] = {}  # by window, (room, room)
        self._now: dict[int | None, torch.Tensor] = {}  # of this pass, (n, seen)
        # of the model's positions, where a slot that has ended may run beyond it before it is seen
        most = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
        self._last = most - 1 if most and most < room else None
        self._table: torch.Tensor | None = None  # (room, 2 d + room): cosines, sines and mask of each position
        self._turned: torch.Tensor | None = None  # of this pass, (n, 2 d + room)
        self._window: int | None = None
        if base.fast_decoder is not None:
            self._make_table(base.fast_decoder)

    def _make_table(self, fast_decoder) -> None:  # type: ignore[no-untyped-def]
        """Put the rotary factors and the mask of a position side by side: a pass reads both at once."""
        like = torch.zeros((1, 1, 1), dtype=self.base.dtype, device=self.base.device)
        positions = torch.arange(self.room, dtype=torch.long, device=self.base.device)[None]
        tables = rotary_tables(fast_decoder.decoder, like, positions)
        self._window = self._least_window(fast_decoder.layers[0].attention[1])
        mask = self._visible(self._window, self.base.dtype)
        self._table = torch.cat([*(one.flatten(1) for one in tables), mask], dim=1)

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens (n,) that are fed next."""
        return self._record.view(torch.long)[: self.rows, 0]

    @property
    def positions(self) -> torch.Tensor:
        """Their positions, (n,)."""
        return self._places[0, : self.rows]

    def step(self) -> None:
        """Feed a token of each of the first n slots, and draw the next one."""
        self._now.clear()
        self._turned = None if self._table is None else self._table.index_select(0, self.positions)
        positions = self.positions if self._last is None else self.positions.clamp(max=self._last)
        hidden = self.base.next_hidden_states(self.tokens[None], positions[None], self)
        flat = self._places[1, : self.rows]
        uniforms = self._uniforms.index_select(0, flat)[:, None]
        record = self._record[: self.rows]
        token, logp = record.view(torch.long)[:, :1], record[:, 2:3]
        self._draws.next(hidden, uniforms, self.positions, (token, logp))
        self._records.index_copy_(0, flat, record)
        self._places[:, : self.rows].add_(self._steps[:, : self.rows])

    @property
    def shape(self) -> tuple[int, ...]:
        """What of a pass is fixed when it is captured: its rows and the tokens that it sees."""
        return (self.rows, self.seen)

    def save(self) -> tuple[torch.Tensor, ...] | None:
        """Return what a pass changes beside the keys, which it writes anew; None where layers pass on a state."""
        return None if self._states else tuple(x.clone() for x in (self._places, self._record))

    def restore(self, saved: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Be as before the pass; return the tokens and log-probs that it drew."""
        drawn = self._record.clone()
        for x, before in zip((self._places, self._record), saved, strict=True):
            x.copy_(before)
        return drawn

    def agree(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two passes drew nearly the same tokens with the same log-probs to the rounding of 16 bits.

        A library may multiply in another order when it is captured, and a draw on the edge then gives another token:
        one row may differ, where there are four or more.
        """
        same = one.view(torch.long)[:, 0] == other.view(torch.long)[:, 0]
        close = (one[:, 2] - other[:, 2]).abs() <= ROUNDING
        return int((~(same & close)).sum()) <= min(1, self.rows // 4)

    def rotary_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines (n, 1, d) of this pass, as `decode.fast_decoder.rotary_tables`."""
        assert self._turned is not None
        both = self._turned[:, : self._turned.shape[1] - self.room]
        return tuple(both.unflatten(1, (2, 1, -1)).unbind(1))  # type: ignore[return-value]

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
        """See `AttentionContext.attend`; T is n, one token a slot.

        Query heads of one key head are queries of one product, so no grouped-query call is made, which is left to the
        math kernel. The memory-efficient kernel takes a mask whose rows lie a multiple of 8 numbers apart, and any
        card; it needs head sizes that are multiples of 8 in 16 bit, of 4 in fp32.
        """
        rows, kv_heads = self.rows, k.shape[0]
        keys, values = self._store(layer, k, v)
        at = self._places[1, :rows]
        keys.flatten(0, 1).index_copy_(0, at, k.transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, at, v.transpose(0, 1))
        keys, values = (x[:rows, : self.seen].transpose(1, 2) for x in (keys, values))  # (n, nkv, seen, d)
        queries = q.transpose(0, 1).unflatten(1, (kv_heads, -1))  # (n, nkv, nh / nkv, d)
        mask = self._mask(window, q.dtype)[:, None, None]
        if softcap:
            scores = (queries * scaling) @ keys.transpose(-1, -2)
            scores = torch.tanh(scores.float() / softcap) * softcap
            out = (scores + mask).softmax(-1).to(values.dtype) @ values
        else:
            mask = mask.expand(rows, kv_heads, queries.shape[2], self.seen)
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
        return out.flatten(1, 2)

    def mix(self, key: StateKey, tensors: Sequence[torch.Tensor], mix: Mix) -> torch.Tensor:
        """See `AttentionContext.mix`; T is n, one token a slot, and each goes on from its own state."""
        state = self._states[key][: self.rows]
        out, after = mix([x.transpose(0, 1) for x in tensors], state)
        if after.data_ptr() != state.data_ptr():
            state.copy_(after)
        return out.transpose(0, 1)

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values for k (nkv, .., d) and v (nkv, .., dv)."""
        if layer not in self._keys:
            for held, x in ((self._keys, k), (self._values, v)):
                shape = (self.count, self.room, x.shape[0], x.shape[-1])
                held[layer] = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return self._keys[layer], self._values[layer]

    def _least_window(self, window: int | None) -> int | None:
        return None if window is None or window >= self.room else window

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return a summand (n, seen) that hides what lies behind a row's position, or before its window."""
        window = self._least_window(window)
        if self._turned is not None and window == self._window:
            return self._turned[:, self._turned.shape[1] - self.room :][:, : self.seen]
        if window not in self._now:
            if window not in self._masks:
                self._masks[window] = self._visible(window, dtype)
            self._now[window] = self._masks[window].index_select(0, self.positions)
        return self._now[window][:, : self.seen]

    def _visible(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask of every position, (room, room): 0 where it sees, else minus infinity."""
        at = torch.arange(self.room, dtype=torch.long, device=self.base.device)
        hidden = at[None] > at[:, None]
        if window is not None:
            hidden |= at[None] <= at[:, None] - window
        zero = torch.zeros(hidden.shape, dtype=dtype, device=self.base.device)
        return zero.masked_fill_(hidden, float("-inf"))

    def begin(
        self,
        slots: Sequence[int],
        keys: dict[int, tuple[torch.Tensor, torch.Tensor]],
        states: dict[StateKey, torch.Tensor],
        hidden: torch.Tensor,
        prompt: Sequence[int],
        uniforms: torch.Tensor,
    ) -> None:
        """Begin completions of one prompt in these slots, and draw their first tokens.

        Args:
            keys: by layer the prompt's keys and values, (nkv, P, d) each.
            states: the prompt's final states, (1, ..) each.
            hidden: (1, H), which predicts the first tokens.
            prompt: its token ids.
            uniforms: of all tokens of these completions, (completions, tokens) on the device.
        """
        index, length = self._index(slots), len(prompt)
        for layer, (k, v) in keys.items():
            for held, x in zip(self._store(layer, k, v), (k, v), strict=True):
                held[:, :length].index_copy_(0, index, x.transpose(0, 1).expand(len(slots), -1, -1, -1))
        for key, state in states.items():
            if key not in self._states:
                shape = (self.count, *state.shape[1:])
                self._states[key] = torch.zeros(shape, dtype=state.dtype, device=state.device)
            self._states[key].index_copy_(0, index, state.expand(len(slots), *state.shape[1:]))
        token, logp = self._draws.first(index, hidden, prompt, uniforms[:, :1].t())
        record = torch.zeros((len(slots), WORDS), dtype=torch.float32, device=self.base.device)
        record.view(torch.long)[:, 0], record[:, 2] = token[0], logp[0]
        first = index * self.room + length  # of the completions' tokens
        self._record.index_copy_(0, index, record)
        self._records.index_copy_(0, first - 1, record)
        rest = uniforms[:, 1:]
        among = torch.arange(rest.shape[1], dtype=torch.long, device=self.base.device)
        self._uniforms.index_copy_(0, (first[:, None] + among).flatten(), rest.flatten())
        position = torch.full_like(index, length)
        self._places.index_copy_(1, index, torch.stack((position, first)))
        self._steps.index_fill_(1, index, 1)

    def reset(self) -> None:
        """Let all slots stand still."""
        self.rows, self.seen = self.count, self.room
        self._places[0] = REST
        self._places[1] = torch.arange(self.count, dtype=torch.long, device=self.base.device) * self.room + REST
        self._steps.zero_()
        self._record.zero_()

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.base.device)

    def rest(self, slots: Sequence[int]) -> None:
        """Let these slots stand still at `REST`.

        Where they ended, a window may hide all keys that the others' passes still read: such a row is not a number.
        """
        index = self._index(slots)
        self._steps.index_fill_(1, index, 0)
        self._places.index_copy_(1, index, torch.stack((torch.full_like(index, REST), index * self.room + REST)))

    def move(self, order: Sequence[int]) -> None:
        """Put these slots first, in this order; what the others hold is lost."""
        index = self._index(order)
        count = len(order)
        by_slot = [self._record, *self._keys.values(), *self._values.values(), *self._states.values()]
        by_slot += self._draws.by_slot
        by_slot += [self._records.unflatten(0, (self.count, -1)), self._uniforms.unflatten(0, (self.count, -1))]
        for x in by_slot:  # one at a time: what is moved is there twice
            x[:count] = x.index_select(0, index)
        for x in (self._places, self._steps):
            x[:, :count] = x.index_select(1, index)
        self._places[1, :count] = self._places[0, :count] + self.room * torch.arange(
            count, dtype=torch.long, device=self.base.device
        )

    def look(self, last: int) -> tuple[list[list[int]], list[list[float]]]:
        """Wait for the device; return the tokens and log-probs of the last so many records, by record and slot."""
        back = torch.arange(last, 0, -1, dtype=torch.long, device=self.base.device)
        index = (self._places[1, : self.rows] - back[:, None]).flatten()
        records = self._records.index_select(0, index).to("cpu").unflatten(0, (last, -1))
        return records.view(torch.long)[..., 0].tolist(), records[..., 2].tolist()
