"""From a loaded base to the loop of a reward model."""

from collections.abc import Callable, Sequence

from lowmem_rlhf.algorithms.common.epochs import with_epochs
from lowmem_rlhf.algorithms.reward_model.update import RewardModel
from lowmem_rlhf.data.examples import TrainingData
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory


def build(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: Callable[[Recipe], RunDirectory],
) -> RewardModel:
    """Return the loop; see `algorithms.build.make_trainer`."""
    recipe = with_epochs(recipe, len(data.train))
    return RewardModel(recipe, plan, base, data.train, data.held_out, run_directory(recipe))
