"""From a loaded base to the trainer of a recipe: one builder for each algorithm."""

from collections.abc import Callable, Sequence

from lowmem_rlhf.algorithms.common.epochs import with_epochs
from lowmem_rlhf.algorithms.grpo.trainer import GRPO
from lowmem_rlhf.algorithms.ppo.trainer import PPO
from lowmem_rlhf.algorithms.reinforce_plus_plus.trainer import ReinforcePlusPlus
from lowmem_rlhf.algorithms.reward_model.update import RewardModel
from lowmem_rlhf.algorithms.rloo.trainer import RLOO
from lowmem_rlhf.algorithms.sft.update import SFT
from lowmem_rlhf.data.examples import TrainingData
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.loop import Loop
from lowmem_rlhf.training.online import Algorithm, CompletionEvaluator, Trainer

RunDirectoryOf = Callable[[Recipe], RunDirectory]
Builder = Callable[[Recipe, Plan, SharedBase, Sequence[Reward], TrainingData, RunDirectoryOf], Loop]

# what learns from scored rollouts
ALGORITHMS: dict[str, Callable[[Recipe], Algorithm]] = {
    "grpo": GRPO,
    "ppo": PPO,
    "rloo": RLOO,
    "reinforce_plus_plus": ReinforcePlusPlus,
}


def make_trainer(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: RunDirectoryOf,
) -> Loop:
    """Return the trainer of a recipe, with its run directory begun."""
    return BUILDERS[recipe.algorithm](recipe, plan, base, rewards, data, run_directory)


def check_algorithm(recipe: Recipe) -> None:
    """Check what only the algorithm knows of its settings, before weights are loaded.

    Raises:
        UserError: GRPO's loss cannot be used.
    """
    if recipe.algorithm in ALGORITHMS:
        ALGORITHMS[recipe.algorithm](recipe)


def _online(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: RunDirectoryOf,
) -> Trainer:
    algorithm = ALGORITHMS[recipe.algorithm](recipe)
    return Trainer(recipe, plan, base, rewards, data.train, data.held_out, run_directory(recipe), algorithm)


def _sft(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: RunDirectoryOf,
) -> SFT:
    recipe = with_epochs(recipe, len(data.train))
    ladder = Ladder.of(plan.settings, base.device, recipe.generation.temperature)
    evaluator = CompletionEvaluator(recipe, plan, base, rewards, data.prompts, ladder) if data.prompts else None
    return SFT(recipe, plan, base, data.train, data.held_out, run_directory(recipe), evaluator, ladder)


def _reward_model(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: RunDirectoryOf,
) -> RewardModel:
    recipe = with_epochs(recipe, len(data.train))
    return RewardModel(recipe, plan, base, data.train, data.held_out, run_directory(recipe))


BUILDERS: dict[str, Builder] = {**dict.fromkeys(ALGORITHMS, _online), "sft": _sft, "reward_model": _reward_model}
