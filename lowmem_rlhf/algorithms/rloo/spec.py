"""RLOO: REINFORCE whose baseline is the mean of a prompt's other completions. Loads without torch."""

from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings, one_epoch, updates
from lowmem_rlhf.algorithms.spec import AlgorithmSpec

SPEC = AlgorithmSpec(
    name="rloo",
    title="RLOO",
    section="ppo",
    settings=PPOSettings,
    reference="below",
    entropy_gradient=lambda recipe: bool(recipe.ppo.entropy_coef),
    keeps_states=True,
    updates=updates,
    epochs=lambda recipe: recipe.ppo.num_ppo_epochs,
    compares=lambda recipe: "RLOO",
    prepare=one_epoch,
    learner="lowmem_rlhf.algorithms.rloo.trainer:RLOO",
)
