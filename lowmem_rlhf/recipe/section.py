"""What every section of a recipe is. Loads without torch."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from lowmem_rlhf.recipe.kinds import choices_of, kinds_of
from lowmem_rlhf.suggest import spelled


class Section(BaseModel):
    """A part of a recipe; a key that is not a field is an error, and a choice may be written in capitals."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def kind_of(cls, key: str, given: Mapping[str, Any]) -> Any:
        """Return the annotation of a key's value; Any for a key that is no field.

        Args:
            key: the key.
            given: the texts that stand beside it.
        """
        return cls.model_fields[key].annotation if key in cls.model_fields else Any

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is asked for: Python counts them as 1 and 0."""
        kinds = kinds_of(cls.kind_of(str(info.field_name), {}))
        if isinstance(value, bool) and bool not in kinds and {int, float}.intersection(kinds):
            raise ValueError(f"got {str(value).lower()}; it should be a number")
        return value

    @model_validator(mode="before")
    @classmethod
    def _as_spelled(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: _chosen(value, cls.kind_of(key, {})) for key, value in values.items()}


def _chosen(value: Any, annotation: Any) -> Any:
    """Return a value with its texts as the annotation spells them, where it has such choices."""
    if isinstance(value, list):
        return [_chosen(one, annotation) for one in value]
    return spelled(value, choices_of(annotation)) if isinstance(value, str) else value
