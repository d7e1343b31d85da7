"""A learned reward in place: a reward model's adapter and score head on the base that the policy lies on.

It reads the very tokens of the rollout, so no text is tokenized again, and each prompt runs once for its completions.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lowmem_rlhf.architecture.adapters import HEAD, SavedAdapter, saved_adapter
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import BatchLimits, head_outputs, with_bootstrap_position
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.progress import message


class AdapterReward:
    """The score of a reward model (`algorithm: reward_model`) at a completion's last token.

    Args:
        name: of the reward, for messages.
        saved: its adapter, with a head.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, name: str, saved: SavedAdapter) -> None:
        self.name, self.saved = name, saved
        self.base: SharedBase | None = None
        self.ladder: Ladder | None = None  # of the work on that base, which the reward's passes are a part of

    def bind(self, base: SharedBase, role: str) -> None:
        """Put the adapter and its head on the base as this role.

        Raises:
            UserError: the adapter does not fit the base, or its weights are not finite.
        """
        try:
            base.add_saved_role(role, self.saved)
        except UserError as error:
            raise UserError(f"rewards: {self.name}: {error}") from error
        self.base, self.role = base, role

    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        """Return the scores of N completions, given as token ids; completions of one prompt stand together."""
        assert self.base is not None and self.ladder is not None, "an adapter reward was called before it was bound"
        base, groups = self.base, with_bootstrap_position(_grouped(prompt_ids, completion_ids))

        def work(limits: BatchLimits) -> list[float]:
            scores = head_outputs(base, self.role, groups, limits)
            return [float(scores[row][-1]) for row in range(len(completion_ids))]

        scores = self.ladder.score(work, message)
        for index, value in enumerate(scores):
            if not math.isfinite(value):
                raise RunError(
                    f"its adapter in {self.saved.folder} gives {value} for completion {index + 1} of {len(scores)}; "
                    "the numbers of the base overflow, or the adapter is broken"
                )
        return scores


def load_adapter_reward(name: str, adapter: str, model: str, revision: str | None = None) -> AdapterReward:
    """Return the reward of a reward model's run or adapter folder, yet to be bound to the base of this model.

    Raises:
        UserError: there is no such adapter, it belongs to another base, or it has no score head.
    """
    try:
        saved = saved_adapter(adapter, model, revision)
    except UserError as error:
        raise UserError(f"rewards: {name}: {error}") from error
    if saved.head is None:
        raise UserError(
            f"rewards: {name}: adapter {adapter!r} has no score head ({HEAD}); train it with algorithm: reward_model"
        )
    return AdapterReward(name, saved)


def _grouped(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Group]:
    """Return the completions as groups, a prompt once for those of it that stand together."""
    members = [list(rows) for _, rows in groupby(range(len(prompt_ids)), key=lambda row: list(prompt_ids[row]))]
    return [Group(prompt_ids[rows[0]], [completion_ids[row] for row in rows], rows) for rows in members]
