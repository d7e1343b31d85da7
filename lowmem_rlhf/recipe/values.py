"""From a recipe as it was typed to its values, each read as what the schema asks for at its place.

A text is the text as it was typed, whatever else it looks like; elsewhere a scalar is what YAML 1.2 makes of it.
"""

import re
from dataclasses import dataclass, field
from typing import Any, get_origin

from lowmem_rlhf.recipe.kinds import is_text, item_of, kinds_of
from lowmem_rlhf.recipe.secrets import why_secret
from lowmem_rlhf.recipe.section import Section
from lowmem_rlhf.recipe.yaml_tree import Scalar, Tree

SAID = ("data.template", "data.system")  # texts in which a line break may be meant by a backslash and an n
# of C1 too, as U+009B begins a sequence of a terminal; halves of characters (surrogates) are no text
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_ESCAPES = {0: "\\0", 7: "\\a", 8: "\\b", 11: "\\v", 12: "\\f", 27: "\\e"}
_NO_TRUTHS = ("yes", "no", "on", "off")  # which YAML 1.1 takes for true and false, and 1.2 does not
_NEWLINE = re.compile(r"\\n(?!abla|eq|ot|u\b|e\b|ewline|ewcommand|oindent)")  # not a name of LaTeX


@dataclass
class Reading:
    """What came of a recipe's text.

    Attributes:
        values: for the schema.
        problems: by key, what is wrong with a value before the schema sees it; such a value is left out.
        notes: what may not be meant, a sentence each.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_values(tree: dict[str, Tree], schema: type[Section]) -> Reading:
    """Return the values of a recipe's tree."""
    reading = Reading()
    reading.values = _Typing(reading).read(tree, schema, "")
    return reading


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section that a value of an annotation may be."""
    return next((kind for kind in kinds_of(annotation) if isinstance(kind, type) and issubclass(kind, Section)), None)


def part_of(annotation: Any, part: str | int, tree: Tree | None) -> Any:
    """Return the annotation of a part of a value: a key of it, or an item; Any where the schema says nothing."""
    if isinstance(part, int):
        return item_of(annotation) or Any
    entries = tree if isinstance(tree, dict) else {}
    texts = {key: one.text for key, one in entries.items() if isinstance(one, Scalar)}
    return section.kind_of(part, texts) if (section := section_of(annotation)) else Any


def takes_structure(annotation: Any) -> bool:
    """Whether a list or keys with values can stand at this place."""
    kinds = kinds_of(annotation)
    return section_of(annotation) is not None or any(
        kind is Any or kind in (list, dict) or get_origin(kind) in (list, dict) for kind in kinds
    )


def _is_keys(annotation: Any) -> bool:
    """Whether keys with values are all that can stand at this place."""
    return all(kind is dict or get_origin(kind) is dict or section_of(kind) for kind in kinds_of(annotation))


class _Left:
    """Stands for a value that is left out."""


_LEFT = _Left()


class _Typing:
    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def read(self, tree: Tree, annotation: Any, key: str) -> Any:
        if isinstance(tree, Scalar):
            return self._scalar(tree, annotation, key)
        if not takes_structure(annotation) and is_text(annotation):
            sort = "a mapping ({...})" if isinstance(tree, dict) else "a list ([...])"
            self.reading.problems[key] = f"got {sort}; it should be a text, and one that begins with {{ or [ or holds "
            self.reading.problems[key] += "': ' is written in quotes"
            return _LEFT
        if isinstance(tree, list):
            item = item_of(annotation) or Any
            each = [self.read(one, _value_or_section(item), f"{key}[{index}]") for index, one in enumerate(tree)]
            return [one for one in each if one is not _LEFT]
        values = {
            name: self.read(one, part_of(annotation, name, tree), f"{key}.{name}".lstrip("."))
            for name, one in tree.items()
        }
        return {name: value for name, value in values.items() if value is not _LEFT}

    def _scalar(self, scalar: Scalar, annotation: Any, key: str) -> Any:
        if match := _CONTROL.search(scalar.text):
            self.reading.problems[key] = _control(match[0])
            return _LEFT
        if secret := why_secret(scalar.text):
            self.reading.problems[key] = secret
            return _LEFT
        if scalar.doubt:
            self.reading.notes.append(
                f"{key}: YAML reads {scalar.doubt[:2]} in double quotes as a character of its own, so this is not "
                f"{scalar.doubt}; write the text in single quotes"
            )
        if key in SAID and _NEWLINE.search(scalar.text):
            self.reading.notes.append(
                f"{key}: holds a backslash and an n, not a line break; a line break is \\n in double quotes "
                f"in the recipe, or {key}=$'...\\n...' in bash"
            )
        if scalar.is_null and _is_keys(annotation) and not key.endswith("]"):
            return _LEFT  # `training:` with all of its keys taken out
        if is_text(annotation):
            if scalar.is_null:
                return None
            if (items := self._listed(scalar, annotation)) is not None:
                return items
            return scalar.text if str in kinds_of(annotation) else scalar.text.strip()
        if (items := self._listed(scalar, annotation)) is not None:
            return items
        value = scalar.value()
        if scalar.plain and Any in kinds_of(annotation) and scalar.text.strip().casefold() in _NO_TRUTHS:
            self.reading.notes.append(f"{key}: is the text {value!r}; what is true or false is written so")
        return value

    def _listed(self, scalar: Scalar, annotation: Any) -> list[str] | None:
        """Return what a plain scalar lists where a list of names is asked for: ``q_proj,v_proj``."""
        item = item_of(annotation)
        text = scalar.text.strip()
        if item in (None, Any) or not scalar.plain or scalar.is_null or not text or text[0] in "[{":
            return None
        alone = not is_text(annotation)  # no text is allowed in the list's place
        return [one.strip() for one in text.split(",")] if alone or "," in text else None


def _value_or_section(item: Any) -> Any:
    """Return the annotation to read a list's items by: names are no numbers, so these are refused there."""
    return item if section_of(item) else Any


def _control(character: str) -> str:
    escape = _ESCAPES.get(ord(character))
    if "\ud800" <= character <= "\udfff":
        return f"holds half of a character (the surrogate U+{ord(character):04X}); take it out"
    cause = f", which is what YAML makes of {escape} in double quotes" if escape else ""
    return f"holds the control character U+{ord(character):04X}{cause}; write the text in single quotes, or take it out"
