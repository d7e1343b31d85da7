"""The recipe's section `sft`. Loads without torch."""

from typing import Literal

from pydantic import Field

from lowmem_rlhf.recipe.bounds import MOST_STEPS, MOST_TOKENS
from lowmem_rlhf.recipe.section import Section


class SFTSettings(Section):
    """Supervised fine-tuning, under TRL's names. Examples are always packed."""

    max_length: int = Field(1024, ge=2, le=MOST_TOKENS)  # tokens of an example
    completion_only_loss: bool = True  # False: prompts are learned too
    learn: Literal["last", "all"] = "last"  # of a conversation's answers: the last one, or each of them
    # held-out loss every so many steps; absent: before and after
    eval_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
