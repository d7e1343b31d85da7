"""Dynamic sampling: groups whose completions all got the same reward are replaced by groups of further prompts.

Such a group has no advantage and teaches nothing (DAPO, arXiv 2503.14476, section 3.2). At most a bound of batches is
sampled; what is missing then is filled with groups without a difference, so that a step has as many groups as ever and
its loss is divided by the same numbers. No torch here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lowmem_rlhf.data.prompts import Example
from lowmem_rlhf.rollout.rollout import Rollout, joined_rollout
from lowmem_rlhf.training.turns import Turns

Sample = Callable[[Sequence[Example], int], Rollout]  # of these prompts, in the batch of this number


def sample_until_different(
    sample: Sample, turns: Turns[Example], prompts: int, batches: int, step: int
) -> tuple[Rollout, dict[str, Any]]:
    """Return a rollout of so many prompts, and what it took.

    Where every group of the first batch has different rewards, that batch is the rollout.

    Args:
        sample: samples and scores prompts.
        turns: gives the prompts; those without a difference are set aside there.
        prompts: groups of the rollout.
        batches: the most that are sampled.
        step: counted from 0.

    Returns:
        The rollout, and metrics: ``groups/sampled``, groups that were sampled; ``groups/set_aside``, prompts that are
        left out of the next step; ``tokens/discarded``, completion tokens of groups that are not in the rollout.
    """
    parts: list[Rollout] = []
    different: list[int] = []
    same: list[int] = []
    asked: list[Example] = []
    while len(parts) < batches and len(different) < prompts:
        examples = turns.take(prompts - len(different), step)
        parts.append(sample(examples, len(parts)))
        for place, apart in enumerate(groups_apart(parts[-1])):
            (different if apart else same).append(len(asked) + place)
        asked += examples
    turns.set_aside([asked[place] for place in same], step)
    kept = different + same[: prompts - len(different)]
    whole = joined_rollout(parts) if len(parts) > 1 else parts[0]
    rollout = whole
    if len(parts) > 1:
        chosen = whole.of_prompts(kept)
        scores = replace(chosen.scored, metrics=whole.scored.metrics, failures=whole.scored.failures)
        rollout = replace(chosen, scores=scores)
    discarded = _tokens(whole) - _tokens(rollout)
    told = {"groups/sampled": len(asked), "groups/set_aside": turns.aside, "tokens/discarded": discarded}
    return rollout, told


def groups_apart(rollout: Rollout) -> list[bool]:
    """Return of each group whether its completions have different rewards; those that none applies to do not count."""
    size, totals = rollout.num_generations, rollout.scored.total
    groups = (totals[start : start + size] for start in range(0, len(totals), size))
    return [len({total for total in group if total == total}) > 1 for group in groups]


def _tokens(rollout: Rollout) -> int:
    return sum(len(completion.ids) for completion in rollout.completions)
