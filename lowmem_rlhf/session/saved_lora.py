"""What a recipe says of its adapter, and the shape of the one that the run goes on from."""

from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.lora_shape import ALL, LoraShape
from lowmem_rlhf.recipe.sections import LoraSettings


def saved_lora(lora: LoraSettings, saved: LoraShape, adapter: str) -> LoraSettings:
    """Return what a recipe says of its adapter in the shape of the one that it goes on from.

    Raises:
        UserError: it sets something else.
    """
    its: dict[str, Any] = {
        **{key: type(lora).model_fields[key].get_default(call_default_factory=True) for key in type(lora).model_fields},
        **saved.values,
    }
    for key in lora.model_fields_set:
        got, has = getattr(lora, key), its[key]
        if key == "target_modules":
            if not isinstance(got, list) or not isinstance(has, list):
                agrees = got in (ALL, has)
            else:  # by their last names: a saved one may list whole names
                agrees = {name.rsplit(".", 1)[-1] for name in got} == {name.rsplit(".", 1)[-1] for name in has}
        else:
            agrees = got in ("auto", has)
        if not agrees:
            raise UserError(
                f"lora.{key}: got {_shown(got)}, but the adapter that the recipe continues from ({adapter}) has "
                f"{_shown(has)}; leave it out or set it to that"
            )
    return lora.model_copy(update=its)


def _shown(value: Any) -> str:
    """Return a setting of an adapter as it is read; of whole names their last parts."""
    if isinstance(value, list):
        return ", ".join(sorted({str(one).rsplit(".", 1)[-1] for one in value}))
    return f"{value:g}" if isinstance(value, float) else str(value)
