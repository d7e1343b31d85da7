"""The recipe's section `classifier`. Loads without torch."""

from pydantic import Field

from lowmem_rlhf.recipe.bounds import MOST_IN_A_PASS, MOST_TOKENS
from lowmem_rlhf.recipe.section import Section


class ClassifierSettings(Section):
    """A sequence classifier (BERT and the like), trained whole; the `model` of the recipe is where it starts."""

    # tokens read of a text; absent: all that the model can read
    max_length: int | None = Field(None, ge=1, le=MOST_TOKENS)
    batch_tokens: int = Field(4096, ge=1, le=MOST_IN_A_PASS)  # tokens of one pass, padding included
