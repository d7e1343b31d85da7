"""What a recipe says of its adapter, and the shape of the one that the run goes on from."""

from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.lora_shape import LoraShape
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import LoraSettings


def as_saved(recipe: Recipe) -> Recipe:
    """Return the recipe with the shape of the adapter that it continues from.

    Raises:
        UserError: that adapter is not there, belongs to another base or has another shape than the recipe sets.
    """
    if recipe.adapter is None:
        return recipe
    from lowmem_rlhf.architecture.adapters import saved_adapter

    saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision)
    lora = saved_lora(recipe.lora, saved.shape, recipe.adapter)
    return recipe.model_copy(update={"lora": lora})


def as_saved_here(recipe: Recipe) -> Recipe:
    """Return what `as_saved` does where that adapter is on this machine; otherwise the recipe, for a plan before it."""
    if recipe.adapter is None:
        return recipe
    from lowmem_rlhf.architecture.adapters import adapter_folder

    try:
        adapter_folder(recipe.adapter, fetch=False)
    except UserError:  # the check of the recipe says what is not there
        return recipe
    return as_saved(recipe)


def saved_lora(lora: LoraSettings, saved: LoraShape, adapter: str) -> LoraSettings:
    """Return what a recipe says of its adapter in the shape of the one that it goes on from.

    What is left at its default is as that adapter has it.

    Raises:
        UserError: it sets something else.
    """
    fields = type(lora).model_fields
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    its: dict[str, Any] = {**defaults, **saved.values}
    for key in (key for key in fields if key in lora.model_fields_set):
        got, has = getattr(lora, key), its[key]
        if got == defaults[key]:
            continue  # as a recipe that is written out whole has it
        if key == "target_modules":
            if not isinstance(got, list) or not isinstance(has, list):
                agrees = got == has
            else:  # by their last names: a saved one may list whole names
                agrees = {name.rsplit(".", 1)[-1] for name in got} == {name.rsplit(".", 1)[-1] for name in has}
        else:
            agrees = got == has
        if not agrees:
            raise UserError(
                f"lora.{key}: got {_shown(got)}, but the adapter that the recipe continues from ({adapter}) "
                f"{'is beside' if key == 'target_modules' else 'has'} {_shown(has)}; leave it out or set it to that"
            )
    return lora.model_copy(update=its)


def _shown(value: Any) -> str:
    """Return a setting of an adapter as it is read; of whole names their last parts."""
    if isinstance(value, list):
        return ", ".join(sorted({str(one).rsplit(".", 1)[-1] for one in value}))
    return f"{value:g}" if isinstance(value, float) else str(value)
