"""The steps of a run whose length is given in epochs."""

import math

from lowmem_rlhf.recipe.schema import Recipe


def with_epochs(recipe: Recipe, examples: int) -> Recipe:
    """Return the recipe with ``training.max_steps`` set from ``num_train_epochs`` passes over so many examples."""
    training = recipe.training
    if training.num_train_epochs is None:
        return recipe
    steps = math.ceil(training.num_train_epochs * examples / training.prompts_per_step)
    return recipe.model_copy(update={"training": training.model_copy(update={"max_steps": steps})})
