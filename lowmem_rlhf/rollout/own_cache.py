"""Decoding with a model's own cache, for models that cannot be packed: every completion carries its prompt's state.

Prompts of equal length run together, each once; their cache is then repeated for the completions. Nothing is padded on
the left, which recurrent layers would not forget. Rows of prompts of different lengths take their tokens in turn.

Shapes: R rows, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import micro_batches
from lowmem_rlhf.rollout.wave import DecodingState, Job, WaveEngine


class OwnCacheEngine(WaveEngine):
    """Every completion has a cache of the model's own kind, its prompt's state included."""

    def waves(
        self, prompts: Sequence[Sequence[int]], num_generations: int, max_completion_length: int, rows: int
    ) -> list[list[Job]]:
        """See `own_cache_waves`."""
        jobs = [(b, b * num_generations + g) for b in range(len(prompts)) for g in range(num_generations)]
        return own_cache_waves(self.base, prompts, jobs, max_completion_length, rows)

    def start(
        self, prompts: Sequence[Sequence[int]], row_prompt: Sequence[int], limit: int, max_tokens: int
    ) -> tuple[DecodingState, torch.Tensor]:
        """See `own_cache_prefill`; the caches grow by themselves, whatever the limit."""
        return own_cache_prefill(self.base, prompts, row_prompt, max_tokens)


@dataclass
class _Part:
    """Rows whose prompts ran together: their cache, their places among all rows, the tokens that they hold."""

    cache: Cache
    rows: list[int]
    length: int


class OwnCaches:
    """The model's own caches of rows that are being written."""

    def __init__(self, parts: list[_Part], device: torch.device) -> None:
        self._parts, self.device = parts, device

    def next_states(self, base: SharedBase, tokens: torch.Tensor) -> torch.Tensor:
        """Run one more token (R,) of each row; return the last hidden states (R, H)."""
        hidden: torch.Tensor | None = None
        for part in self._parts:
            index = self._index(part.rows)
            positions = torch.full((len(part.rows), 1), part.length, dtype=torch.long, device=self.device)
            states = base.stock_states(tokens[index][:, None], positions, part.cache)[:, 0]
            part.length += 1
            if hidden is None:
                hidden = states.new_empty((tokens.shape[0], states.shape[1]))
            hidden[index] = states
        assert hidden is not None
        return hidden

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (places in the present order)."""
        place = {row: i for i, row in enumerate(rows)}
        for part in self._parts:
            stay = [i for i, row in enumerate(part.rows) if row in place]
            if stay and len(stay) < len(part.rows):
                part.cache.reorder_cache(self._index(stay))  # type: ignore[arg-type]
            part.rows = [place[part.rows[i]] for i in stay]
        self._parts = [part for part in self._parts if part.rows]

    def _index(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


class WholeRows:
    """For models without a cache that can follow its rows: each token runs the whole text again."""

    def __init__(self, texts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self._texts, self._max_tokens = [list(text) for text in texts], max_tokens

    def next_states(self, base: SharedBase, tokens: torch.Tensor) -> torch.Tensor:
        """As `OwnCaches.next_states`."""
        self._texts = [[*text, token] for text, token in zip(self._texts, tokens.tolist(), strict=True)]
        return self.last_states(base)

    def last_states(self, base: SharedBase) -> torch.Tensor:
        """Run all texts; return the hidden state (R, H) at the end of each."""
        hidden: dict[int, torch.Tensor] = {}
        groups = [Group(text, [[0]], [row]) for row, text in enumerate(self._texts)]  # a stand-in for what comes next
        for batch in micro_batches(base, groups, self._max_tokens):
            hidden.update(zip(batch.rows, base.states(batch)[batch.predict], strict=True))
        return torch.stack([hidden[row] for row in range(len(self._texts))])

    def keep(self, rows: list[int]) -> None:
        """As `OwnCaches.keep`."""
        self._texts = [self._texts[row] for row in rows]


def own_cache_prefill(
    base: SharedBase, prompts: Sequence[Sequence[int]], row_prompt: Sequence[int], max_tokens: int
) -> tuple[DecodingState, torch.Tensor]:
    """Run the prompts once, those of one length in passes of at most ``max_tokens`` (or one prompt).

    Returns:
        What decoding continues, and the hidden state (R, H) that predicts the first token of each row.
    """
    if not base.keeps_cache:
        texts = WholeRows([prompts[b] for b in row_prompt], max_tokens)
        return texts, texts.last_states(base)
    lengths: dict[int, list[int]] = {}
    for b, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(b)
    parts: list[_Part] = []
    last: dict[int, torch.Tensor] = {}
    for length, members in lengths.items():
        at_once = max(1, max_tokens // length)
        for start in range(0, len(members), at_once):
            chunk = members[start : start + at_once]
            ids = torch.tensor([list(prompts[b]) for b in chunk], dtype=torch.long, device=base.device)
            positions = torch.arange(length, dtype=torch.long, device=base.device).expand(len(chunk), -1)
            cache = DynamicCache(config=base.model.config)
            hidden = base.stock_states(ids, positions, cache)[:, -1]
            last.update(zip(chunk, hidden, strict=True))
            rows = [row for row, b in enumerate(row_prompt) if b in chunk]
            source = [chunk.index(row_prompt[row]) for row in rows]
            cache.reorder_cache(torch.tensor(source, dtype=torch.long, device=base.device))  # type: ignore[arg-type]
            parts.append(_Part(cache, rows, length))
    return OwnCaches(parts, base.device), torch.stack([last[b] for b in row_prompt])


def own_cache_waves(
    base: SharedBase, prompts: Sequence[Sequence[int]], jobs: Sequence[Job], max_completion_length: int, rows: int
) -> list[list[Job]]:
    """Cut jobs into waves, prompts of similar length together.

    A wave's caches hold no more keys than those of ``rows`` completions that share one prompt: only layers whose cache
    grows with the text count.
    """
    layers = DynamicCache(config=base.model.config).layers if base.keeps_cache else []
    share = sum(hasattr(layer, "keys") for layer in layers) / max(len(layers), 1) if layers else 1.0
    waves: list[list[Job]] = []
    room = 0.0
    for job in sorted(jobs, key=lambda job: -len(prompts[job[0]])):
        length = len(prompts[job[0]])
        if not waves or len(waves[-1]) == rows or room < share * (length + max_completion_length):
            waves.append([])
            room = length + rows * max_completion_length
        waves[-1].append(job)
        room -= share * (length + max_completion_length)
    return waves
