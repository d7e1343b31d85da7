"""The shipped recipes by name."""


def recipes() -> dict[str, str]:
    """Return the names of the shipped recipes with what each trains."""
    from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes

    return {name: load_recipe(name, quiet=True).description for name in shipped_recipes()}
