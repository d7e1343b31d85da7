"""What of GRPO's section is checked before anything is loaded."""

from lowmem_rlhf.recipe.schema import Recipe


def check_loss(recipe: Recipe) -> None:
    """Try a loss of the user's own on a few numbers; for the shipped ones, which need no trial, torch is not imported.

    Raises:
        UserError: as `losses.load_loss`.
    """
    if ":" in recipe.grpo.loss_type:
        from lowmem_rlhf.algorithms.grpo.losses import load_loss

        load_loss(recipe.grpo.loss_type, recipe.grpo)
