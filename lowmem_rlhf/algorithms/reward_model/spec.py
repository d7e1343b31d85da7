"""Reward models from preference pairs. Loads without torch."""

from typing import TYPE_CHECKING

from lowmem_rlhf.algorithms.reward_model.settings import RewardModelSettings
from lowmem_rlhf.algorithms.spec import AlgorithmSpec

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe


def _prepare(recipe: "Recipe") -> None:
    data = recipe.data
    data.chosen, data.rejected = data.chosen or "chosen", data.rejected or "rejected"


SPEC = AlgorithmSpec(
    name="reward_model",
    title="reward model",
    section="reward_model",
    settings=RewardModelSettings,
    rows="pairs",
    output="scores",
    rewards="refused",
    lengths=lambda recipe: {"reward_model.max_length": recipe.reward_model.max_length},
    prepare=_prepare,
    build="lowmem_rlhf.algorithms.reward_model.build:build",
)
