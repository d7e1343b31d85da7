"""GRPO: group-relative policy optimisation. Loads without torch."""

from typing import TYPE_CHECKING

from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.spec import AlgorithmSpec, Following

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe


def _compares(recipe: "Recipe") -> str:
    return "" if recipe.grpo.scale_rewards == "none" else "GRPO"


def _follows(recipe: "Recipe") -> Following | None:
    grpo = recipe.grpo
    return Following(grpo.ref_model_rank_multiple, grpo.ref_model_sync_steps) if grpo.sync_ref_model else None


SPEC = AlgorithmSpec(
    name="grpo",
    title="GRPO",
    section="grpo",
    settings=GRPOSettings,
    reference="below",
    follows=_follows,
    scores_policy=False,  # the first update's own pass has the log-probs
    updates=lambda recipe: recipe.grpo.num_iterations,
    epochs=lambda recipe: recipe.grpo.num_iterations,
    entropy_passes=lambda recipe: recipe.grpo.num_iterations if recipe.grpo.top_entropy_quantile < 1 else 0,
    entropy_gradient=lambda recipe: recipe.grpo.entropy_bonus,
    compared=lambda recipe: 1.0 if recipe.grpo.beta else 1 / recipe.generation.num_generations,
    compares=_compares,
    in_fits=True,
    check="lowmem_rlhf.algorithms.grpo.check:check_loss",
    functions=("loss_type",),
    checks_quickly=True,
    learner="lowmem_rlhf.algorithms.grpo.trainer:GRPO",
)
