"""From a loaded base to the loop of supervised fine-tuning."""

from collections.abc import Callable, Sequence

from lowmem_rlhf.algorithms.common.epochs import with_epochs
from lowmem_rlhf.algorithms.sft.update import SFT
from lowmem_rlhf.data.examples import TrainingData
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.online import CompletionEvaluator


def build(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: Callable[[Recipe], RunDirectory],
) -> SFT:
    """Return the loop; see `algorithms.build.make_trainer`."""
    recipe = with_epochs(recipe, len(data.train))
    ladder = Ladder.of(plan.settings, base.device, recipe.generation.temperature)
    evaluator = CompletionEvaluator(recipe, plan, base, rewards, data.prompts, ladder) if data.prompts else None
    return SFT(recipe, plan, base, data.train, data.held_out, run_directory(recipe), evaluator, ladder)
