"""Rollouts for models that can be packed: a prompt's keys lie once, for all of its completions.

Each prompt is prefilled once, packed; finished rows leave the batch.

Shapes: B prompts, G completions a prompt, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem_rlhf.engine.attention import PackedContext
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.logprobs import tiles
from lowmem_rlhf.engine.mixers import StateKey
from lowmem_rlhf.engine.packing import Group, pack
from lowmem_rlhf.rollout.cache import SharedPromptCache
from lowmem_rlhf.rollout.wave import Job, WaveEngine


class SharedPromptEngine(WaveEngine):
    """Keys and values of a prompt are kept once; its completions attend to them in one product."""

    def waves(
        self, prompts: Sequence[Sequence[int]], num_generations: int, max_completion_length: int, rows: int
    ) -> list[list[Job]]:
        """See `waves`."""
        return waves([len(prompt) for prompt in prompts], num_generations, rows)

    def start(
        self, prompts: Sequence[Sequence[int]], row_prompt: Sequence[int], limit: int, max_tokens: int
    ) -> tuple[SharedPromptCache, torch.Tensor]:
        """See `prefill`."""
        return prefill(self.base, prompts, row_prompt, limit, max_tokens)


def waves(lengths: Sequence[int], num_generations: int, rows: int) -> list[list[Job]]:
    """Divide the B * G completions into waves of at most ``rows``, those of the longest prompts first.

    So running out of memory shows at once, and prompts of similar length share a wave, where the keys of each take the
    room of the longest. A wave holds whole groups, or an even part of one where ``rows`` is less than a group: unequal
    parts of groups would take the cache of more rows than there are (see `SharedPromptCache`).

    Args:
        lengths: tokens of the B prompts.

    Returns:
        The waves, each a list of (prompt, row in the whole batch) in ascending order.
    """
    ascending = sorted(range(len(lengths)), key=lambda b: lengths[b])
    divided: list[list[Job]] = []
    # As even as possible: that takes no more waves, a pass takes time about linear in its rows, so nothing is lost, and
    # the largest wave, which sets the peak, is smaller.
    for part in tiles(len(lengths), max(1, rows // num_generations)):
        for members in tiles(num_generations, rows):
            first, last = members.start, members.stop
            divided.append([(b, b * num_generations + g) for b in sorted(ascending[part]) for g in range(first, last)])
    return divided[::-1]  # no tile is larger than the last one


def prefill(
    base: SharedBase, prompts: Sequence[Sequence[int]], row_prompt: Sequence[int], limit: int, max_tokens: int
) -> tuple[SharedPromptCache, torch.Tensor]:
    """Run the prompts once, packed in passes of at most ``max_tokens`` (or one prompt).

    Returns:
        The cache for decoding, and the last hidden state of each prompt, (B, H).
    """
    layers: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    states: dict[StateKey, list[torch.Tensor]] = {}
    last: list[torch.Tensor] = []
    for chunk in prompt_chunks(prompts, max_tokens):
        run = run_prompts(base, chunk)
        last += run.hidden
        for layer in list(run.keys):
            layers.setdefault(layer, []).extend(run.keys.pop(layer))
        for key, state in run.states.items():
            states.setdefault(key, []).append(state)
        del run
    cache = SharedPromptCache(
        layers,
        {key: torch.cat(states.pop(key)) for key in list(states)},
        [len(prompt) for prompt in prompts],
        row_prompt,
        base.device,
        max(limit, 1),
    )
    return cache, torch.stack(last)


@dataclass
class PromptRun:
    """What a pass over packed prompts leaves for decoding.

    Attributes:
        hidden: the last hidden state (H,) of each prompt.
        keys: by layer the keys and values of each prompt, (nkv, P, d) pairs of their own memory.
        states: the prompts' final states, (B, ..).
    """

    hidden: list[torch.Tensor]
    keys: dict[int, list[tuple[torch.Tensor, torch.Tensor]]]
    states: dict[StateKey, torch.Tensor]


def run_prompts(base: SharedBase, prompts: Sequence[Sequence[int]]) -> PromptRun:
    """Run prompts in one packed pass."""
    batch = pack([Group(prompt, [], []) for prompt in prompts], base.device)
    context = PackedContext(batch.buckets, base.device, keep=True)
    hidden = base.hidden_states(batch.input_ids, batch.position_ids, context)
    spans = [(end + 1 - len(p), end + 1) for p, end in zip(prompts, batch.prompt_ends, strict=True)]
    keys: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for layer, (k, v) in (context.kept or {}).items():
        keys[layer] = [(k[:, a:b].clone(), v[:, a:b].clone()) for a, b in spans]  # copies: the packed row is freed
        del k, v
    place = {end: i for i, end in enumerate(sorted(batch.prompt_ends))}
    order = torch.tensor([place[end] for end in batch.prompt_ends], dtype=torch.long, device=base.device)
    states = {key: state.index_select(0, order) for key, state in context.states.items()}
    return PromptRun([hidden[end - 1] for _, end in spans], keys, states)


def prompt_chunks(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[Sequence[int]]]:
    """Divide prompts, in their order, into parts of at most ``max_tokens`` (or one prompt)."""
    chunks: list[list[Sequence[int]]] = []
    tokens = 0
    for prompt in prompts:
        if not chunks or tokens + len(prompt) > max_tokens:
            chunks.append([])
            tokens = 0
        chunks[-1].append(prompt)
        tokens += len(prompt)
    return chunks
