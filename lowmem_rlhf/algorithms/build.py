"""From a loaded base to the trainer of a recipe, as the spec of its algorithm says."""

from collections.abc import Callable, Sequence

from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.data.examples import TrainingData
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.loop import Loop
from lowmem_rlhf.training.online import Trainer

RunDirectoryOf = Callable[[Recipe], RunDirectory]


def make_trainer(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: RunDirectoryOf,
) -> Loop:
    """Return the trainer of a recipe, with its run directory begun.

    Args:
        run_directory: makes it, given the recipe with the steps that its epochs are.

    Raises:
        UserError: the data or the settings do not suit.
    """
    trainer: Loop = resolve(recipe.spec.build)(recipe, plan, base, rewards, data, run_directory)
    return trainer


def online(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: RunDirectoryOf,
) -> Trainer:
    """Return the trainer of an algorithm that samples and scores what its learner learns from."""
    spec = recipe.spec
    if spec.learner is None:
        raise TypeError(f"the spec of {spec.name} has neither a learner nor a build of its own")
    learner, updates = resolve(spec.learner)(recipe), spec.updates(recipe)
    return Trainer(recipe, plan, base, rewards, data.train, data.held_out, run_directory(recipe), learner, updates)
