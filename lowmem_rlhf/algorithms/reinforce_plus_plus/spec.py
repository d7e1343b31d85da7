"""REINFORCE++: PPO's tokens and clipping without a critic. Loads without torch."""

from typing import TYPE_CHECKING

from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings, one_epoch, updates
from lowmem_rlhf.algorithms.spec import AlgorithmSpec

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe


def _compares(recipe: "Recipe") -> str:
    return "REINFORCE++ with ppo.group_baseline" if recipe.ppo.group_baseline else ""


SPEC = AlgorithmSpec(
    name="reinforce_plus_plus",
    title="REINFORCE++",
    section="ppo",
    settings=PPOSettings,
    reference="below",
    entropy_gradient=lambda recipe: bool(recipe.ppo.entropy_coef),
    keeps_states=True,
    updates=updates,
    epochs=lambda recipe: recipe.ppo.num_ppo_epochs,
    compares=_compares,
    prepare=one_epoch,
    learner="lowmem_rlhf.algorithms.reinforce_plus_plus.trainer:ReinforcePlusPlus",
)
