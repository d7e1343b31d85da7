"""The reference of every recipe key, made of the schema: annotations, defaults, and the comments on its fields."""

import inspect
import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lowmem_rlhf.recipe.field_roles import role_of
from lowmem_rlhf.recipe.kinds import item_of, kinds_of
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import REWARD_OPTIONS

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping", NoneType: "null"}
_BOUNDS = {"ge": "≥ {:g}", "gt": "> {:g}", "le": "≤ {:g}", "lt": "< {:g}", "min_length": "not empty"}
_NO_BOUND = 10_000  # an upper bound from here on only keeps nonsense out


@dataclass(frozen=True)
class Key:
    """A key of a recipe that has a value of its own.

    Attributes:
        name: dotted; ``[]`` stands for each of a list.
        field: of the schema.
        about: what it is, from the comments on the field.
        above: the docstring of its section.
    """

    name: str
    field: FieldInfo
    about: str
    above: str

    @property
    def default(self) -> str:
        """What holds where the key is absent, as a recipe would write it."""
        if self.field.is_required():
            return "needed"
        value = self.field.get_default(call_default_factory=True)
        return "absent" if value is None or value is PydanticUndefined else _written(value)

    @property
    def kind(self) -> str:
        """What a value may be: choices, kinds and bounds."""
        bounds = [text for one in self.field.metadata if (text := _bound(one))]
        return " or ".join(dict.fromkeys(_kinds(self.field.annotation, bounds))).replace("|", "\\|")


def all_keys(section: type[BaseModel] = Recipe, prefix: str = "", seen: Sequence[str] = ()) -> Iterator[Key]:
    """Yield every key with a value of its own, sections within sections, in the order of the schema.

    A section of a task that the recipe itself has is one key: its own keys are the recipe's.
    """
    about = comments(section)
    for name, field in section.model_fields.items():
        item = item_of(field.annotation)
        below = _section(field.annotation if item is None else item)
        again = name in seen and below is not None and below is _section(Recipe.model_fields[name].annotation)
        if below is None or item is not None or again:
            text = f"as `{name}` of the recipe" if again else about.get(name, "")
            yield Key(prefix + name, field, text, inspect.cleandoc(section.__doc__ or ""))
        if below is not None and not again and not (item is not None and name in seen):
            yield from all_keys(below, f"{prefix}{name}{'' if item is None else '[]'}.", tuple(section.model_fields))


def option_keys() -> Iterator[Key]:
    """Yield the keys of ``rewards[].options`` of each learned reward."""
    for reward, section in REWARD_OPTIONS.items():
        for key in all_keys(section):
            yield Key(f"{reward}: {key.name}", key.field, key.about, key.above)


def comments(section: type[BaseModel]) -> dict[str, str]:
    """Return the comments on each field of a section: those beside it, and those on the lines above it."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            found |= _comments_in(inspect.getsource(kind), set(kind.model_fields))
    return found


def _comments_in(source: str, names: set[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    above: list[str] = []
    field, depth, begins = "", 0, True
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc("\n" + source)).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if token.type == tokenize.INDENT else -1
        elif token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            found[field].append(text) if field else above.append(text)
        elif token.type == tokenize.NEWLINE:
            field, above, begins = "", [], True
        elif token.type != tokenize.NL:
            if begins and depth == 1 and token.string in names:
                field = token.string
                found[field], above = above, []
            begins = False
    return {name: " ".join(texts) for name, texts in found.items() if texts}


def _section(annotation: Any) -> type[BaseModel] | None:
    return next((one for one in kinds_of(annotation) if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _kinds(annotation: Any, bounds: list[str]) -> Iterator[str]:
    """Yield what a value of an annotation may be, numbers with their bounds."""
    if get_origin(annotation) is Annotated:
        kind, *rest = get_args(annotation)
        told = [one for each in rest for one in (each.metadata if isinstance(each, FieldInfo) else [each])]
        yield from _kinds(kind, bounds + [text for one in told if (text := _bound(one))])
    elif get_origin(annotation) is Literal:
        yield ", ".join(f"`{one}`" for one in get_args(annotation))
    elif get_origin(annotation) is list:
        yield f"list of {' or '.join(_kinds(get_args(annotation)[0], []))}"
    elif get_origin(annotation) is dict:
        yield "mapping"
    elif get_args(annotation):
        for one in get_args(annotation):
            yield from _kinds(one, bounds)
    elif _section(annotation) is not None:
        yield "sections"
    elif annotation in (int, float):
        yield f"{_WORDS[annotation]} {', '.join(bounds)}".strip()
    else:
        yield _WORDS.get(annotation, "any")


def _bound(one: Any) -> str:
    name = next((name for name in _BOUNDS if hasattr(one, name)), None)
    if name in ("le", "lt") and getattr(one, name) >= _NO_BOUND:
        return ""
    return _BOUNDS[name].format(getattr(one, name)) if name else ""


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if value == "" else str(value)


def page() -> str:
    """Return the page of the reference."""
    parts = [_HEAD]
    sections: dict[str, list[Key]] = {}
    for key in all_keys():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    for section, found in sections.items():
        parts.append(f"## {section or 'The recipe'}\n\n{found[0].above}\n\n{_table(found)}")
    parts.append(f"## Options of learned rewards\n\nUnder `rewards[].options`.\n\n{_table(list(option_keys()))}")
    return "\n\n".join(parts) + "\n"


def _table(found: list[Key]) -> str:
    changing = [key for key in found if (role := role_of(key.field)) is not None and role.may_change_on_resume]
    rows = ["| key | default | values | what it is |", "|---|---|---|---|"]
    if len(changing) == len(found):
        rows = ["A run that is resumed takes new values of all of these.", "", *rows]
        changing = []
    for key in found:
        name = key.name.rpartition(".")[2] if ": " not in key.name else key.name
        rows.append(f"| `{name}` | `{key.default}` | {key.kind} | {_sentence(key)}{_RESUMED * (key in changing)} |")
    return "\n".join(rows)


def _sentence(key: Key) -> str:
    about = key.about.replace("|", "\\|").replace("{", "&#123;").replace("<", "&lt;")
    first = about if about.split(" ")[0].endswith(":") else about[:1].upper() + about[1:]  # a choice by its name
    return first + ("" if about.endswith(".") else ".")


_RESUMED = " A resume may change it."
_HEAD = """# Every key of a recipe

Made of the schema that checks a recipe, when this site is built. A key that is not here is an error with a suggestion.
On the command line a key is written with dots: `grpo.beta=0.04`, `rewards[0].weight=0.5`. *Absent* means that the key
is left out or `null`; *needed* that there is no default. Names are those of TRL, PEFT and transformers where they have
one."""
