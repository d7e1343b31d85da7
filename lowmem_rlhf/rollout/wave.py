"""Completions written in waves on the shared base: what the engines of this package have in common.

A wave of completions starts together and ends with its longest one; rows that have ended leave it on the way. How many
run at once is at most the plan's ``rollout_batch_size``. What is left out: speculative decoding.

Shapes: B prompts, G completions a prompt, R rows of a wave, U draws from one distribution, V vocabulary, H hidden.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import torch

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.progress import ProgressCallback
from lowmem_rlhf.rollout.draws import Draws
from lowmem_rlhf.rollout.ends import Ends
from lowmem_rlhf.rollout.rollout import Completion, Share
from lowmem_rlhf.rollout.sampling import LARGEST, Sampling

COMPACT_BELOW = 0.75  # rows leave once no more than this share of the batch is still being written

Job = tuple[int, int]  # the number of a prompt, and the row of one of its completions in the whole batch


class DecodingState(Protocol):
    """Caches of rows that are being written."""

    def next_states(self, base: SharedBase, tokens: torch.Tensor) -> torch.Tensor:
        """Run one more token (R,) of each row; return the last hidden states (R, H)."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (places in the present order)."""
        ...


class WaveEngine(ABC):
    """An engine that samples on the shared base itself, so that the policy that samples is the one that trains.

    Args:
        base: the base; completions are those of the role that it is in.
        dequantize: whether NF4 weights are unpacked while sampling; None: they stay as the caller has them.
    """

    def __init__(self, base: SharedBase, dequantize: bool | None = None) -> None:
        self.base, self.dequantize = base, dequantize

    def sync(self) -> None:  # noqa: B027 (there is nothing that could be out of step)
        """Do nothing: the adapters that train are the ones that sample."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        max_completion_length: int | Sequence[int],
        sampling: Sampling,
        limits: RolloutLimits,
        seed: int,
        progress: ProgressCallback | None = None,
        share: Share | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; see `rollout.engine.Engine.generate`."""
        most = most_tokens(max_completion_length, len(prompts))
        uniforms = drawn_ahead(len(prompts) * num_generations, max(most), seed, share)
        completions: list[Completion | None] = [None] * len(uniforms)
        copies = None if self.dequantize is None else self.dequantize and limits.copy_weights
        with nullcontext() if copies is None else self.base.decoding(copies, limits.copy_weights):
            for wave in self.waves(prompts, num_generations, max(most), limits.rows):
                self._write(prompts, wave, most, uniforms, sampling, limits, completions, progress)
        complete = [c for c in completions if c is not None]
        return [complete[i : i + num_generations] for i in range(0, len(complete), num_generations)]

    @abstractmethod
    def waves(
        self, prompts: Sequence[Sequence[int]], num_generations: int, max_completion_length: int, rows: int
    ) -> list[list[Job]]:
        """Divide the B * G completions into waves of at most ``rows``."""

    @abstractmethod
    def start(
        self, prompts: Sequence[Sequence[int]], row_prompt: Sequence[int], limit: int, max_tokens: int
    ) -> tuple[DecodingState, torch.Tensor]:
        """Run the prompts in passes of at most ``max_tokens`` (or one prompt).

        Args:
            row_prompt: for each row of the wave the number of its prompt.
            limit: the most completion tokens that will be fed.

        Returns:
            What decoding continues, and the hidden states that predict the first tokens: (B, H), or (R, H).
        """

    def _write(
        self,
        prompts: Sequence[Sequence[int]],
        wave: list[Job],
        most: Sequence[int],
        uniforms: torch.Tensor,
        sampling: Sampling,
        limits: RolloutLimits,
        completions: list[Completion | None],
        progress: ProgressCallback | None,
    ) -> None:
        """Write the completions of a wave into their places among all."""
        base, used = self.base, sorted({b for b, _ in wave})
        place = {b: i for i, b in enumerate(used)}
        row_prompt = [place[b] for b, _ in wave]
        last = {row: most[b] - 1 for b, row in wave}  # the place of a completion's last token, if it is cut
        length = max(last.values()) + 1
        state, hidden = self.start([prompts[b] for b in used], row_prompt, length - 1, limits.prefill_tokens)
        rows = [row for _, row in wave]
        first = uniforms[rows, 0].view(
            hidden.shape[0], -1
        )  # a prompt's logits are made once, for its equally many rows
        draws = Draws(base, sampling, [prompts[b] for b in used], row_prompt, limits.tile)
        tokens, logp = draws.first(hidden, first)
        ids: dict[int, list[int]] = {row: [] for row in rows}
        logps: dict[int, list[float]] = {row: [] for row in rows}
        live = list(range(len(rows)))  # places in `rows` still being written
        ends = Ends(base, sampling)
        ended = {row: ends.of_one() for row in rows}
        for t in range(length):
            token_list, logp_list = tokens.tolist(), logp.tolist()
            check_finite(base, logp_list, t)
            still: list[int] = []
            for i in live:
                ids[rows[i]].append(token_list[i])
                logps[rows[i]].append(logp_list[i])
                if (done := ended[rows[i]](token_list[i])) or t == last[rows[i]]:
                    completions[rows[i]] = Completion(ids[rows[i]], logps[rows[i]], not done)
                else:
                    still.append(i)
            if progress and len(still) < len(live):
                progress(sum(c is not None for c in completions), len(completions))
            live = still
            if not live:
                return
            if len(live) <= COMPACT_BELOW * len(rows):
                state.keep(live)
                staying = torch.tensor(live, dtype=torch.long, device=base.device)
                draws.keep(staying)
                tokens = tokens[staying]
                rows, live = [rows[i] for i in live], list(range(len(live)))
            hidden = state.next_states(base, tokens)
            tokens, logp = draws.next(hidden, uniforms[rows, t + 1], tokens)


def most_tokens(max_completion_length: int | Sequence[int], prompts: int) -> list[int]:
    """Return the most tokens of a completion of each prompt."""
    if isinstance(max_completion_length, int):
        return [max_completion_length] * prompts
    return list(max_completion_length)


def drawn_ahead(rows: int, length: int, seed: int, share: Share | None = None) -> torch.Tensor:
    """Return a uniform number up to `LARGEST` for every token of every completion, (rows, length) fp32 on the CPU.

    Args:
        share: the rows are these of all, and have the numbers that they have where one process draws for all.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shape = (share.completions, share.length) if share else (rows, length)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").clamp_(max=LARGEST)
    return drawn[share.first : share.first + rows, :length].contiguous() if share else drawn


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
