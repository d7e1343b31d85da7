"""The recipe's section `classifier`. Loads without torch."""

from pydantic import Field

from lowmem_rlhf.recipe.section import Section


class ClassifierSettings(Section):
    """A sequence classifier (BERT and the like), trained whole; the `model` of the recipe is where it starts."""

    max_length: int | None = Field(None, ge=1)  # tokens read of a text; absent: all that the model can read
    batch_tokens: int = Field(4096, ge=1)  # tokens of one pass, padding included
