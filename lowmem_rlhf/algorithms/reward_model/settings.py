"""The recipe's section `reward_model`. Loads without torch."""

from pydantic import Field

from lowmem_rlhf.recipe.bounds import MOST_COEFFICIENT, MOST_STEPS, MOST_TOKENS
from lowmem_rlhf.recipe.section import Section


class RewardModelSettings(Section):
    """A reward model from preference pairs (Bradley-Terry), under TRL's names."""

    max_length: int = Field(1024, ge=2, le=MOST_TOKENS)  # tokens of a prompt with one answer
    center_rewards_coefficient: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)  # pulls the two scores' sum to 0
    # held-out loss every so many steps; absent: before and after
    eval_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
