"""Changes of a recipe from a command line: ``training.max_steps=10``, ``rewards[0].weight=2``, ``data.system=# Title``.

Where the schema asks for a text, the text is what was typed; a list or keys with values are YAML in flow style. Keys
are merged into those that are there, anything else is replaced.
"""

import re
from typing import Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.kinds import kinds_of
from lowmem_rlhf.recipe.section import Section
from lowmem_rlhf.recipe.values import part_of, section_of, takes_structure
from lowmem_rlhf.recipe.yaml_tree import BadYAML, Scalar, Tree, read_yaml

Path = tuple[str | int, ...]


def apply_override(tree: dict[str, Tree], override: str, schema: type[Section]) -> tuple[Path, Tree]:
    """Change a recipe's tree; return the place and what it was given.

    Raises:
        UserError: it is not of the form key=value, or there is no such place.
    """
    key, sep, text = override.partition("=")
    path = _path(key.strip())
    if not sep or not path:
        raise UserError(f"override {override!r} is not of the form key=value, for example training.max_steps=10")
    try:
        holder, annotation = _holder(tree, path, schema)
        value = _value(text, annotation)
        _put(holder, path, value)
    except BadYAML as error:
        raise UserError(f"override {override!r} cannot be applied: {error}") from None
    return path, value


class _NoPlace(BadYAML):
    """An override names a place that a recipe cannot have."""


def _path(key: str) -> Path:
    """Return the parts of ``rewards[0].weight``; none where it is not of that form."""
    if not re.fullmatch(r"[^.\[\]]+(\[[^.\[\]]+\])*(\.[^.\[\]]+(\[[^.\[\]]+\])*)*", key):
        return ()
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"[.\[\]]+", key) if part)


def _holder(tree: dict[str, Tree], path: Path, schema: type[Section]) -> tuple[Any, Any]:
    """Return the list or the keys that hold a place, and the annotation of the place; make keys that are missing."""
    here: Any = tree
    annotation: Any = schema
    for depth, part in enumerate(path):
        part = _part_in(here, part, path[:depth])
        annotation = part_of(annotation, part, here)
        if depth == len(path) - 1:
            break
        below = here.get(part) if isinstance(here, dict) else here[part]
        if isinstance(below, Scalar) and not below.is_null and _is_named_by_function(annotation):
            below = here[part] = {"function": below}
        elif below is None or (isinstance(below, Scalar) and below.is_null):
            below = here[part] = {}
        here = below
    return here, annotation


def _is_named_by_function(annotation: Any) -> bool:
    """Whether a plain name at this place stands for keys, of which it is the function."""
    section = section_of(annotation)
    return section is not None and "function" in section.model_fields


def _part_in(here: Any, part: str | int, above: Path) -> Any:
    """Return a part as its holder wants it."""
    name = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in above).lstrip(".")
    if isinstance(here, dict):
        return str(part)
    if isinstance(here, Scalar):
        raise _NoPlace(f"{name} holds one value ({here.text!r}), no keys")
    if not isinstance(part, int):
        raise _NoPlace(f"{name} is a list; say which of its items is meant, for example {name}[0].{part}")
    if part >= len(here):
        raise _NoPlace(f"the list has no item of that number ({name} has {len(here)}, counted from 0)")
    return part


def _put(holder: Any, path: Path, value: Tree) -> None:
    part = _part_in(holder, path[-1], path[:-1])
    held = holder.get(part) if isinstance(holder, dict) else holder[part]
    holder[part] = merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value


def merged(below: dict[str, Tree], above: dict[str, Tree]) -> dict[str, Tree]:
    """Return keys with those of a second mapping put over them, at every depth; lists are replaced."""
    result = dict(below)
    for key, value in above.items():
        held = result.get(key)
        result[key] = merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return result


def _value(text: str, annotation: Any) -> Tree:
    """Return what was typed: in matching quotes a YAML scalar, else a structure where one may stand, else itself."""
    typed, stripped = Scalar(text, typed=True), text.strip()
    if len(stripped) > 1 and stripped[0] in "\"'" and stripped[-1] == stripped[0]:
        quoted = _parsed(stripped)
        return quoted if isinstance(quoted, Scalar) else typed
    if stripped[:1] not in ("[", "{") or not takes_structure(annotation):
        return typed
    structure = _parsed(stripped)
    if structure is None or (Any in kinds_of(annotation) and _is_place_holder(structure)):
        return typed
    return structure


def _parsed(text: str) -> Tree | None:
    """Return a tree, or None for what is not YAML."""
    try:
        return read_yaml(text)
    except BadYAML as error:
        if "given twice" in str(error):
            raise
        return None


def _is_place_holder(tree: Tree) -> bool:
    """Whether it is ``{question}``, a text with a place-holder, where YAML sees a key without a value."""
    return isinstance(tree, dict) and any(
        isinstance(one, Scalar) and one.plain and not one.text for one in tree.values()
    )
