"""PPO: clipped policy optimisation with a critic. Loads without torch."""

from typing import TYPE_CHECKING

from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings, check_section, updates
from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.recipe.sections import REWARD_ADAPTER

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe


def _prepare(recipe: "Recipe") -> None:
    check_section(recipe)
    if 0 < recipe.training.max_steps <= recipe.ppo.critic_warmup_steps:
        raise ValueError(
            f"ppo.critic_warmup_steps: got {recipe.ppo.critic_warmup_steps} of {recipe.training.max_steps} steps "
            "(training.max_steps), in which the policy would never move; lower it"
        )
    adapters = [reward for reward in recipe.rewards if reward.function == REWARD_ADAPTER]
    if recipe.ppo.critic == "reward" and not adapters:
        raise ValueError(f"ppo.critic: got reward, but no reward of this recipe is a {REWARD_ADAPTER}")


def _bootstrap(recipe: "Recipe") -> bool:
    return recipe.ppo.bootstrap_truncated or recipe.ppo.score_position == "after_last"


def _critic_rate(recipe: "Recipe") -> tuple[float | None, float | None]:
    return recipe.ppo.critic_learning_rate, recipe.ppo.critic_max_grad_norm


def _critic_warmup(recipe: "Recipe") -> int:
    return recipe.ppo.critic_warmup_steps


SPEC = AlgorithmSpec(
    name="ppo",
    title="PPO",
    section="ppo",
    settings=PPOSettings,
    reference="below",
    critic=lambda recipe: recipe.ppo.critic,
    critic_rate=_critic_rate,
    critic_warmup=_critic_warmup,
    bootstrap=_bootstrap,
    entropy_gradient=lambda recipe: bool(recipe.ppo.entropy_coef),
    keeps_states=True,
    updates=updates,
    epochs=lambda recipe: recipe.ppo.num_ppo_epochs,
    prepare=_prepare,
    in_fits=True,
    learner="lowmem_rlhf.algorithms.ppo.trainer:PPO",
)
