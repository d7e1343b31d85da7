"""From a loaded base to the trainer of a recipe."""

from collections.abc import Callable, Sequence

from lowmem_rlhf.algorithms.common.epochs import with_epochs
from lowmem_rlhf.algorithms.reward_model.update import RewardModel
from lowmem_rlhf.algorithms.sft.update import SFT
from lowmem_rlhf.data.examples import TrainingData
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.loop import Loop
from lowmem_rlhf.training.online import Algorithm, CompletionEvaluator, Trainer


def make_trainer(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: Callable[[Recipe], RunDirectory],
) -> Loop:
    """Return the trainer of a recipe, with its run directory begun."""
    if recipe.algorithm == "sft":
        recipe = with_epochs(recipe, len(data.train))
        judge = CompletionEvaluator(recipe, plan, base, rewards, data.prompts).evaluate if data.prompts else None
        return SFT(recipe, plan, base, data.train, data.held_out, run_directory(recipe), judge)
    if recipe.algorithm == "reward_model":
        recipe = with_epochs(recipe, len(data.train))
        return RewardModel(recipe, plan, base, data.train, data.held_out, run_directory(recipe))
    return Trainer(
        recipe,
        plan,
        base,
        rewards,
        data.train,
        data.held_out,
        run_directory(recipe),
        algorithm_of(recipe),
        updates_of(recipe),
    )


def algorithm_of(recipe: Recipe) -> Algorithm:
    """Return the algorithm that a recipe names."""
    if recipe.algorithm == "grpo":
        from lowmem_rlhf.algorithms.grpo.trainer import GRPO

        return GRPO(recipe)
    from lowmem_rlhf.algorithms.ppo.trainer import PPO

    return PPO(recipe)


def updates_of(recipe: Recipe) -> int:
    """Return the optimizer steps of each step."""
    if recipe.algorithm == "grpo":
        return recipe.grpo.num_iterations
    return recipe.ppo.num_ppo_epochs * recipe.ppo.num_mini_batches
