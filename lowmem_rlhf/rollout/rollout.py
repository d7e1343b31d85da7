"""Completions of prompts, sampled or given: what every algorithm learns from."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_rlhf.engine.packing import Group


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: its tokens, the stop token included.
        logps: their log-probs under the sampling policy at the sampling temperature.
        truncated: the length limit was reached without a stop token.
    """

    ids: list[int]
    logps: list[float]
    truncated: bool


@dataclass(frozen=True)
class Batch:
    """The whole batch of a step: B prompts, N = B * G completions, row n belongs to prompt n // G.

    Attributes:
        prompts: token ids of the B prompts.
        completions: the N completions.
        advantages: N numbers.
        num_generations: G.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Completion]
    advantages: Sequence[float]
    num_generations: int

    def groups(self, rows: Sequence[int]) -> list[Group]:
        """Return the groups of these completions, each prompt once."""
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(row // self.num_generations, []).append(row)
        return [Group(self.prompts[b], [self.completions[n].ids for n in ns], ns) for b, ns in members.items()]
