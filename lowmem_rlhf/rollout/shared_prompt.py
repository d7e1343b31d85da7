"""Rollouts: sample completions of prompts in the current role.

Each prompt is prefilled once, packed; its keys are shared by its completions; finished rows leave the batch. A model
that cannot be packed keeps its own cache (see `own_cache`).
What is left out: speculative and continuous batching. A wave of completions starts together and ends with its
longest one; how many run at once is at most the plan's ``rollout_batch_size``.

Shapes: B prompts, G completions a prompt, R rows of a wave, U draws from one distribution, V vocabulary, H hidden.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lowmem_rlhf.engine.attention import PackedContext
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.logprobs import tiles
from lowmem_rlhf.engine.packing import Group, pack
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.rollout.cache import SharedPromptCache
from lowmem_rlhf.rollout.own_cache import UnsharedRows, start_unshared, unshared_waves
from lowmem_rlhf.rollout.rollout import Completion
from lowmem_rlhf.rollout.sampling import Sampling, draw

COMPACT_BELOW = 0.75  # rows leave once no more than this share of the batch is still being written


@dataclass(frozen=True)
class Limits:
    """What bounds a rollout's memory: completions at once, prompt tokens in one prefill, rows in one logits tile."""

    rows: int
    prefill_tokens: int
    tile: int


@torch.no_grad()
def generate(
    base: SharedBase,
    prompts: Sequence[Sequence[int]],
    num_generations: int,
    max_completion_length: int,
    sampling: Sampling,
    limits: Limits,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """Return ``num_generations`` completions for each prompt, in the role that ``base`` is in.

    Args:
        prompts: token ids, none empty.
        seed: the same seed gives the same completions, however many run at once.
        progress: called with (finished completions, all completions).

    Raises:
        RunError: the logits are not finite.
    """
    uniforms = drawn_ahead(len(prompts) * num_generations, max_completion_length, seed)
    done: list[Completion | None] = [None] * len(uniforms)
    if base.packable:
        parts = waves([len(prompt) for prompt in prompts], num_generations, limits.rows)
    else:
        jobs = [(b, b * num_generations + g) for b in range(len(prompts)) for g in range(num_generations)]
        parts = unshared_waves(base, prompts, jobs, max_completion_length, limits.rows)
    for wave in parts:
        _wave(base, prompts, wave, uniforms, max_completion_length, sampling, limits, done, progress)
    complete = [c for c in done if c is not None]
    return [complete[i : i + num_generations] for i in range(0, len(complete), num_generations)]


def drawn_ahead(rows: int, length: int, seed: int) -> torch.Tensor:
    """Return a uniform number for every token of every completion, (rows, length) fp32 on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.rand((rows, length), generator=generator, dtype=torch.float32, device="cpu")


def waves(lengths: Sequence[int], num_generations: int, rows: int) -> list[list[tuple[int, int]]]:
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
    found: list[list[tuple[int, int]]] = []
    # As even as possible: that takes no more waves, a pass takes time about linear in its rows, so nothing is lost, and
    # the largest wave, which sets the peak, is smaller.
    for part in tiles(len(lengths), max(1, rows // num_generations)):
        for members in tiles(num_generations, rows):
            first, last = members.start, members.stop
            found.append([(b, b * num_generations + g) for b in sorted(ascending[part]) for g in range(first, last)])
    return found[::-1]  # no tile is larger than the last one


def _wave(
    base: SharedBase,
    prompts: Sequence[Sequence[int]],
    wave: list[tuple[int, int]],
    uniforms: torch.Tensor,
    max_completion_length: int,
    sampling: Sampling,
    limits: Limits,
    done: list[Completion | None],
    progress: Callable[[int, int], None] | None,
) -> None:
    used = sorted({b for b, _ in wave})
    place = {b: i for i, b in enumerate(used)}
    row_prompt = [place[b] for b, _ in wave]
    state, hidden = start(
        base, [prompts[b] for b in used], row_prompt, max_completion_length - 1, limits.prefill_tokens
    )
    rows = [row for _, row in wave]
    first = uniforms[rows, 0].view(hidden.shape[0], -1)  # a prompt's logits are made once for its rows, equally many
    tokens, logp = draw_tiled(base, hidden, first, sampling, limits.tile)
    ids: dict[int, list[int]] = {row: [] for row in rows}
    logps: dict[int, list[float]] = {row: [] for row in rows}
    live = list(range(len(rows)))  # places in `rows` still being written
    stops = base.stop_ids
    for t in range(max_completion_length):
        token_list, logp_list = tokens.tolist(), logp.tolist()
        check_finite(base, logp_list, t)
        still: list[int] = []
        for i in live:
            ids[rows[i]].append(token_list[i])
            logps[rows[i]].append(logp_list[i])
            if token_list[i] in stops or t == max_completion_length - 1:
                done[rows[i]] = Completion(ids[rows[i]], logps[rows[i]], token_list[i] not in stops)
            else:
                still.append(i)
        if progress and len(still) < len(live):
            progress(sum(c is not None for c in done), len(done))
        live = still
        if not live:
            return
        if len(live) <= COMPACT_BELOW * len(rows):
            state.keep(live)
            tokens = tokens[torch.tensor(live, dtype=torch.long, device=base.device)]
            rows, live = [rows[i] for i in live], list(range(len(live)))
        hidden = state.next_states(base, tokens)
        tokens, logp = draw_tiled(base, hidden, uniforms[rows, t + 1][:, None], sampling, limits.tile)


def check_finite(base: SharedBase, logps: Sequence[float], t: int) -> None:
    """Check the log-probs of the tokens drawn at place ``t``.

    Raises:
        RunError: one is not finite, as the logits then are not.
    """
    if not all(map(math.isfinite, logps)):
        raise RunError(
            f"the model's logits are not finite (completion token {t + 1}, {base.dtype}); with float16 take "
            "hardware.compute_dtype=bfloat16 or float32, otherwise lower training.learning_rate"
        )


def start(
    base: SharedBase, prompts: Sequence[Sequence[int]], row_prompt: Sequence[int], limit: int, max_tokens: int
) -> tuple[SharedPromptCache | UnsharedRows, torch.Tensor]:
    """Run the prompts; return what decoding continues, and the hidden states of the first tokens.

    Those are (B, H), or (R, H) where the rows keep caches of their own.
    """
    if not base.packable:
        return start_unshared(base, prompts, row_prompt, max_tokens)
    return prefill(base, prompts, row_prompt, limit, max_tokens)


def draw_tiled(
    base: SharedBase, hidden: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and log-probs (K * U,) for hidden states (K, H) and uniforms (K, U)."""
    uniforms, missing = uniforms.to(base.device), base.missing
    parts = [
        draw(base.head.logits(hidden[part]), uniforms[part], sampling, missing) for part in tiles(hidden.shape[0], tile)
    ]
    return torch.cat([token for token, _ in parts]).flatten(), torch.cat([logp for _, logp in parts]).flatten()


def prefill(
    base: SharedBase, prompts: Sequence[Sequence[int]], row_prompt: Sequence[int], limit: int, max_tokens: int
) -> tuple[SharedPromptCache, torch.Tensor]:
    """Run the prompts once, packed in passes of at most ``max_tokens`` (or one prompt).

    Returns:
        The cache for decoding, and the last hidden state of each prompt, (B, H).
    """
    layers: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    last: list[torch.Tensor] = []
    for chunk in _chunks(prompts, max_tokens):
        batch = pack([Group(prompt, [], []) for prompt in chunk], base.device)
        context = PackedContext(batch.buckets, base.device, keep=True)
        hidden = base.hidden_states(batch.input_ids, batch.position_ids, context)
        spans = [(end + 1 - len(p), end + 1) for p, end in zip(chunk, batch.prompt_ends, strict=True)]
        last += [hidden[end - 1] for _, end in spans]
        for layer, (k, v) in (context.kept or {}).items():
            pairs = layers.setdefault(layer, [])
            pairs += [(k[:, a:b].clone(), v[:, a:b].clone()) for a, b in spans]  # copies: the packed row is freed
        del context, hidden, k, v
    return SharedPromptCache(layers, row_prompt, base.device, max(limit, 1)), torch.stack(last)


def _chunks(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[Sequence[int]]]:
    chunks: list[list[Sequence[int]]] = [[]]
    tokens = 0
    for prompt in prompts:
        if chunks[-1] and tokens + len(prompt) > max_tokens:
            chunks.append([])
            tokens = 0
        chunks[-1].append(prompt)
        tokens += len(prompt)
    return chunks
