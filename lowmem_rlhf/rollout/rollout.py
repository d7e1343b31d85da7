"""A rollout: completions of prompts, sampled or given, and what becomes of them on the way to an update.

Every online algorithm takes the same value: sampling fills in the completions, the rewards their texts and scores, the
algorithm the advantages. What is not known yet is None.

Shapes: B prompts, G completions a prompt, N = B * G completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.rollout.scores import Scores, joined


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: its tokens, the stop token, or what completes a stop string, included.
        logps: their log-probs under the sampling policy at the sampling temperature.
        truncated: the length limit was reached without a stop token or a stop string.
    """

    ids: list[int]
    logps: list[float]
    truncated: bool


@dataclass(frozen=True)
class Share:
    """Where the completions that one of several processes samples stand among all of the step.

    Attributes:
        first: the place of its first completion.
        completions: of all processes.
        length: tokens of the longest completion that any of them may have.
    """

    first: int
    completions: int
    length: int


@dataclass(frozen=True)
class Rollout:
    """The rollout of a step; row n belongs to prompt n // G.

    Attributes:
        prompts: token ids of the B prompts.
        completions: the N completions.
        num_generations: G.
        questions: (B,) the prompts as the data has them, messages or texts.
        tasks: (B,) the names of the tasks that they are of; None: there is one task only.
        texts: (N,) what rewards read of the completions.
        scores: of the completions.
        advantages: (N,) of the completions; where every token has its own, their mean. A completion that no reward
            applies to has 0.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Completion]
    num_generations: int
    questions: Sequence[Any] | None = None
    texts: Sequence[str] | None = None
    scores: Scores | None = None
    advantages: Sequence[float] | None = None
    tasks: Sequence[str] | None = None

    @property
    def scored(self) -> Scores:
        """The scores of a rollout that has been scored."""
        assert self.scores is not None, "the rollout has not been scored yet"
        return self.scores

    @property
    def known_advantages(self) -> Sequence[float]:
        """The advantages of a rollout that has them."""
        assert self.advantages is not None, "the rollout has no advantages yet"
        return self.advantages

    def of_task(self, task: str) -> "Rollout":
        """Return the part of a scored rollout that is of one task."""
        assert self.tasks is not None
        return self.of_prompts([b for b, name in enumerate(self.tasks) if name == task])

    def of_prompts(self, prompts: Sequence[int]) -> "Rollout":
        """Return the part of a scored rollout that is of these prompts, given by their places."""
        assert self.questions is not None and self.texts is not None
        rows = [b * self.num_generations + g for b in prompts for g in range(self.num_generations)]
        return Rollout(
            [self.prompts[b] for b in prompts],
            [self.completions[n] for n in rows],
            self.num_generations,
            [self.questions[b] for b in prompts],
            [self.texts[n] for n in rows],
            self.scored.of_rows(rows),
            None if self.advantages is None else [self.advantages[n] for n in rows],
            None if self.tasks is None else [self.tasks[b] for b in prompts],
        )

    def groups(self, rows: Sequence[int]) -> list[Group]:
        """Return the groups of these completions, each prompt once."""
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(row // self.num_generations, []).append(row)
        return [Group(self.prompts[b], [self.completions[n].ids for n in ns], ns) for b, ns in members.items()]


def joined_rollout(parts: Sequence[Rollout]) -> Rollout:
    """Return scored rollouts as one, their prompts one after another."""
    counts = [len(part.completions) for part in parts]
    starts = [sum(counts[:place]) for place in range(len(parts))]
    rows = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    return Rollout(
        [prompt for part in parts for prompt in part.prompts],
        [completion for part in parts for completion in part.completions],
        parts[0].num_generations,
        [question for part in parts for question in part.questions or ()],
        [text for part in parts for text in part.texts or ()],
        joined([(list(own), part.scored) for own, part in zip(rows, parts, strict=True)]),
        tasks=None if parts[0].tasks is None else [task for part in parts for task in part.tasks or ()],
    )
