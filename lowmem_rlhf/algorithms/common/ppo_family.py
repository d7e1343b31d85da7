"""What PPO, RLOO and REINFORCE++ share besides their trainer: the recipe's section `ppo`. Loads without torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lowmem_rlhf.recipe.bounds import MOST_COEFFICIENT, MOST_EPOCHS, MOST_PROMPTS, MOST_RATE, MOST_ROWS, MOST_STEPS
from lowmem_rlhf.recipe.section import Section

if TYPE_CHECKING:
    from lowmem_rlhf.recipe.schema import Recipe


class PPOSettings(Section):
    """PPO's hyper-parameters, under the names of TRL's last PPO; RLOO and REINFORCE++ have those that fit them."""

    kl_coef: float = Field(0.05, ge=0, le=MOST_COEFFICIENT)  # of the KL penalty in each token's reward
    kl_estimator: Literal["k1", "k3"] = "k1"  # k1: the log-ratio; k3: exp(r) - 1 - r, which is never negative
    # nats a completion that an adaptive kl_coef aims at; absent: fixed
    kl_target: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)
    kl_horizon: float = Field(10_000, gt=0, le=MOST_ROWS)  # completions over which the adaptive coefficient changes
    num_ppo_epochs: int = Field(4, ge=1, le=MOST_EPOCHS)  # passes over each rollout; absent in RLOO and REINFORCE++: 1
    num_mini_batches: int = Field(1, ge=1, le=MOST_PROMPTS)  # optimizer steps of an epoch
    cliprange: float = Field(0.2, gt=0, le=MOST_COEFFICIENT)  # how far the policy's ratio counts from 1
    entropy_coef: float = Field(0.0, ge=0, le=MOST_COEFFICIENT)  # of the entropy in the objective; 0: none
    # the epochs end once approx_kl is above 1.5 times this
    target_kl: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)
    gamma: float = Field(1.0, gt=0, le=1)  # discount from token to token
    # subtracted from the score of an answer that was cut
    missing_eos_penalty: float | None = Field(None, ge=0, le=MOST_COEFFICIENT)
    # standardise scores over the step, or by their running mean and deviation
    normalize_scores: Literal["none", "batch", "running"] = "none"
    cliprange_reward: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)  # scores stay within plus and minus this
    # PPO: parameters of its own, its own that begin as the reward adapter's, or a head on the policy
    critic: Literal["adapter", "reward", "policy"] = "adapter"
    lam: float = Field(0.95, ge=0, le=1)  # PPO: lambda of generalized advantage estimation
    # PPO: of the value loss beside the policy's; a critic with parameters of its own learns the same whatever it is,
    # since AdamW divides by the gradient's size: see critic_learning_rate
    vf_coef: float = Field(0.1, gt=0, le=MOST_COEFFICIENT)
    # PPO: of the critic's own parameters, whose gradients are clipped by themselves then; absent:
    # training.learning_rate
    critic_learning_rate: float | None = Field(None, gt=0, le=MOST_RATE)
    critic_max_grad_norm: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)  # PPO: as max_grad_norm
    critic_warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)  # PPO: the first steps, in which the critic learns alone
    normalize_values: bool = False  # PPO: the critic learns returns by their running mean and deviation
    # PPO: how far a value counts from the one of the rollout
    cliprange_value: float | None = Field(0.2, gt=0, le=MOST_COEFFICIENT)
    whiten_rewards: bool = False  # PPO: standardise the rewards of tokens before advantages are made
    bootstrap_truncated: bool = False  # PPO: an answer that was cut is worth what the critic expects from there
    score_position: Literal["last", "after_last"] = "last"  # PPO: after_last is one slot later, as TRL's PPO had it
    normalize_advantages: bool = False  # RLOO: standardise advantages over the step
    group_baseline: bool = False  # REINFORCE++: scores less their prompt's mean


def updates(recipe: "Recipe") -> int:
    """Return the optimizer steps of a step: every epoch's mini-batches."""
    return recipe.ppo.num_ppo_epochs * recipe.ppo.num_mini_batches


def check_section(recipe: "Recipe") -> None:
    """Check the settings that the whole family reads.

    Raises:
        ValueError: two of them do not go together.
    """
    ppo = recipe.ppo
    if ppo.bootstrap_truncated and ppo.score_position != "last":
        raise ValueError("ppo.bootstrap_truncated: is for ppo.score_position=last; after_last has that slot already")
    completions = recipe.training.prompts_per_step * recipe.generation.num_generations
    if ppo.kl_target and completions > ppo.kl_horizon:
        raise ValueError(f"ppo.kl_horizon: got {ppo.kl_horizon:g} for steps of {completions} completions; raise it")


def one_epoch(recipe: "Recipe") -> None:
    """Check the section of an algorithm without a critic, and set the one epoch over a rollout that suits it.

    With four, as PPO has them, a fifth to a half of RLOO's ratios of whole completions are clipped, without a gradient.

    Raises:
        ValueError: see `check_section`.
    """
    if "num_ppo_epochs" not in recipe.ppo.model_fields_set:
        recipe.ppo.num_ppo_epochs = 1
    check_section(recipe)
