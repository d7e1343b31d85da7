"""What a field of a recipe is to a run that goes on: stated once, on the field, and read with `fields_with`.

A field of ``hardware`` or ``training`` always has a `FieldRole`; elsewhere only a field that something asks about has
one, and a field without a role counts as part of what is learned.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lowmem_rlhf.recipe.kinds import item_of, kinds_of


@dataclass(frozen=True, kw_only=True)
class FieldRole:
    """How a field may be treated after the run has been planned, begun or finished.

    Attributes:
        changes_numbers: the value decides what is computed, and not only in which order sums are rounded.
        may_change_on_resume: a resumed run takes a new value.
        may_change_in_evaluation: an evaluation of the finished run takes a new value.
        only_batching: the value decides how work is cut into passes and nothing else.
        fixed_once_loaded: a base that has been loaded stays as this value says.
        trl_advises_auto: a run with one of TRL's trainers that does not fit is advised to leave it to the plan.
    """

    changes_numbers: bool
    may_change_on_resume: bool
    may_change_in_evaluation: bool = False
    only_batching: bool = False
    fixed_once_loaded: bool = False
    trl_advises_auto: bool = False


WHERE = FieldRole(changes_numbers=False, may_change_on_resume=True)  # where and when the same work is done
PRECISION = FieldRole(changes_numbers=True, may_change_on_resume=True, fixed_once_loaded=True, trl_advises_auto=True)
PLACEMENT = FieldRole(changes_numbers=False, may_change_on_resume=True, fixed_once_loaded=True)
RECOMPUTING = FieldRole(changes_numbers=False, may_change_on_resume=True, trl_advises_auto=True)
BATCHING = FieldRole(
    changes_numbers=False, may_change_on_resume=True, may_change_in_evaluation=True, only_batching=True
)
TRAINING_BATCHING = FieldRole(
    changes_numbers=False,
    may_change_on_resume=True,
    may_change_in_evaluation=True,
    only_batching=True,
    trl_advises_auto=True,
)
LEARNED = FieldRole(changes_numbers=True, may_change_on_resume=False)
LENGTH = FieldRole(changes_numbers=True, may_change_on_resume=True)  # of the run; the learning rate follows it
RECORDS = FieldRole(changes_numbers=False, may_change_on_resume=True)  # what is written down, and how often
LEARNED_AND_MEASURED = FieldRole(changes_numbers=True, may_change_on_resume=False, may_change_in_evaluation=True)
# what is done about a fault, which a sound run has none of
FAULTS = FieldRole(changes_numbers=False, may_change_on_resume=True, may_change_in_evaluation=True)
MEASURED = FieldRole(changes_numbers=False, may_change_on_resume=False, may_change_in_evaluation=True)
# which server does the same work
SERVED = FieldRole(changes_numbers=False, may_change_on_resume=True, may_change_in_evaluation=True)
JUDGED = FieldRole(changes_numbers=False, may_change_on_resume=False)  # which of a run's evaluations is the better


def role_of(field: FieldInfo) -> FieldRole | None:
    """Return the role that stands on a field; None where none does."""
    return next((one for one in field.metadata if isinstance(one, FieldRole)), None)


def fields_with(section: type[BaseModel], **wanted: bool) -> tuple[str, ...]:
    """Return the fields of a section whose role has all of these values, in the order of the schema.

    Args:
        section: of a recipe.
        wanted: values by attribute of `FieldRole`, for example ``only_batching=True``.
    """
    return tuple(name for name, field in section.model_fields.items() if _has(role_of(field), wanted))


def _has(role: FieldRole | None, wanted: dict[str, bool]) -> bool:
    return role is not None and all(getattr(role, name) == value for name, value in wanted.items())


def keys_with(recipe: type[BaseModel], **wanted: bool) -> tuple[str, ...]:
    """Return the dotted keys of a recipe whose fields have these roles, as `fields_with` finds them.

    Where every field of a section has them, ``SECTION.*`` stands for all, and the key alone for a list of sections
    (``rewards``); these come first. ``rewards[].NAME`` is a field of each of a list.
    """
    whole: list[str] = []
    single: list[str] = []
    for key, field in recipe.model_fields.items():
        listed = item_of(field.annotation)
        for section in _sections(field.annotation if listed is None else listed):
            names = fields_with(section, **wanted)
            if len(names) == len(section.model_fields):
                whole.append(f"{key}.*" if listed is None else key)
            else:
                single += [f"{key}.{name}" if listed is None else f"{key}[].{name}" for name in names]
    return (*whole, *single)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [kind for kind in kinds_of(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
