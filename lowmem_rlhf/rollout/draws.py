"""What the next tokens of rows are drawn by beside their logits: what each row has written, and how long it is.

Shapes: B prompts, R rows, K hidden states, U draws from one distribution, V vocabulary, H hidden.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lowmem_rlhf.engine.logprobs import tiles
from lowmem_rlhf.rollout.sampling import Sampling, draw

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase


class Draws:
    """The draws of rows that are written side by side, all at the same length.

    Args:
        base: the base that decodes.
        sampling: how tokens are drawn.
        prompts: token ids of the B prompts.
        row_prompt: for each row the number of its prompt.
        tile: rows in one logits tile.
    """

    def __init__(
        self,
        base: "SharedBase",
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        row_prompt: Sequence[int],
        tile: int,
    ) -> None:
        self._base, self._sampling, self._tile, self._length = base, sampling, tile, 0
        stops = stops_to_hide(base, sampling)
        self._early = stops if stops is None or base.missing is None else stops | base.missing  # (V,)
        self._seen: torch.Tensor | None = None  # (R, V)
        if sampling.repetition_penalty != 1:
            each = torch.tensor(list(row_prompt), dtype=torch.long, device=base.device)
            self._seen = seen_tokens(base, prompts).index_select(0, each)

    def first(self, hidden: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first tokens and log-probs (K * U,) for hidden states (K, H) and uniforms (K, U).

        K is R, or B where the rows of each prompt are equally many and stand side by side: their logits are made once.
        """
        seen = None if self._seen is None else self._seen[:: self._seen.shape[0] // hidden.shape[0]]
        return self._draw(hidden, uniforms, seen)

    def next(
        self, hidden: torch.Tensor, uniforms: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens and log-probs (R,) that follow ``tokens`` (R,), for states (R, H) and uniforms (R,)."""
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return self._draw(hidden, uniforms[:, None], self._seen)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these (places in the present order, on the device)."""
        if self._seen is not None:
            self._seen = self._seen.index_select(0, rows)

    def _draw(
        self, hidden: torch.Tensor, uniforms: torch.Tensor, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        base, uniforms = self._base, uniforms.to(self._base.device)
        missing = self._early if self._length < self._sampling.min_new_tokens else base.missing
        self._length += 1
        parts = [
            draw(
                base.head.logits(hidden[part]),
                uniforms[part],
                self._sampling,
                missing,
                seen=None if seen is None else seen[part],
            )
            for part in tiles(hidden.shape[0], self._tile)
        ]
        return torch.cat([token for token, _ in parts]).flatten(), torch.cat([logp for _, logp in parts]).flatten()


def stops_to_hide(base: "SharedBase", sampling: Sampling) -> torch.Tensor | None:
    """Return which tokens are not drawn before ``min_new_tokens``, (V,) bool; None where nothing is hidden."""
    if not sampling.min_new_tokens:
        return None
    stops = sorted(stop for stop in base.stop_ids if stop < base.head.vocabulary)
    return _marked(base, [stops])[0]


def seen_tokens(base: "SharedBase", prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return which tokens stand in each prompt, (B, V) bool on the base's device."""
    return _marked(base, prompts)


def _marked(base: "SharedBase", rows: Sequence[Sequence[int]]) -> torch.Tensor:
    vocabulary = base.head.vocabulary
    mask = torch.zeros((len(rows), vocabulary), dtype=torch.bool, device=base.device)
    for row, ids in zip(mask, rows, strict=True):
        known = sorted({i for i in ids if i < vocabulary})  # embeddings may have more rows than there are logits
        row.index_fill_(0, torch.tensor(known, dtype=torch.long, device=base.device), True)
    return mask


class SlotDraws:
    """As `Draws`, for slots (see `rollout.slots`): what it holds stays where it is, and each slot has its own length.

    Args:
        count: S, the slots.
    """

    def __init__(self, base: "SharedBase", count: int, sampling: Sampling, tile: int) -> None:
        self._base, self._sampling, self._tile, device = base, sampling, tile, base.device
        self._stops = stops_to_hide(base, sampling)  # (V,), hidden at all positions before these, (S,)
        self._may_stop = None if self._stops is None else torch.zeros((count,), dtype=torch.long, device=device)
        self._seen: torch.Tensor | None = None  # (S, V)
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros((count, base.head.vocabulary), dtype=torch.bool, device=device)

    @property
    def by_slot(self) -> list[torch.Tensor]:
        """What is held of each slot, (S, ..) each."""
        return [x for x in (self._seen, self._may_stop) if x is not None]

    def first(
        self, slots: torch.Tensor, hidden: torch.Tensor, prompt: Sequence[int], uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Begin in these slots, and return the first tokens and log-probs (1, U) for a state (1, H)."""
        seen, missing = None, self._base.missing
        if self._seen is not None:
            seen = seen_tokens(self._base, [prompt])
            self._seen.index_copy_(0, slots, seen.expand(len(slots), -1))
        if self._stops is not None and self._may_stop is not None:
            # the token that is drawn at position p is the completion's token number p - len(prompt) + 2
            self._may_stop.index_fill_(0, slots, len(prompt) + self._sampling.min_new_tokens - 1)
            missing = self._stops if missing is None else self._stops | missing
        return draw(self._base.head.logits(hidden), uniforms, self._sampling, missing, seen=seen)

    def next(
        self,
        hidden: torch.Tensor,
        uniforms: torch.Tensor,
        positions: torch.Tensor,
        into: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Draw the next token of the first n slots.

        Args:
            hidden, uniforms: (n, H) and (n, 1).
            positions: (n,) of the tokens that were fed.
            into: (n, 1) each, the tokens that were fed and their log-probs, in whose place the next ones are written.
        """
        rows, (token, logp) = len(positions), into
        if self._seen is not None:
            # not the token that is drawn: a pass may be taken back and run once more
            self._seen[:rows].scatter_(1, token, True)
        early = None if self._may_stop is None else (positions < self._may_stop[:rows])[:, None]  # (n, 1)
        for part in tiles(rows, self._tile):
            logits = self._base.head.logits(hidden[part])
            seen = None if self._seen is None else self._seen[:rows][part]
            missing = self._missing(None if early is None else early[part])
            draw(logits, uniforms[part], self._sampling, missing, (token[part], logp[part]), seen)

    def _missing(self, early: torch.Tensor | None) -> torch.Tensor | None:
        """Return which tokens are not drawn, (V,), or (n, V) where (n, 1) says of which rows stops are hidden."""
        missing = self._base.missing
        if early is None or self._stops is None:
            return missing
        stops = early & self._stops
        return stops if missing is None else stops.logical_or_(missing)
