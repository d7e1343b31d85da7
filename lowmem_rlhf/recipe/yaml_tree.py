"""Recipes as YAML: read into a tree whose scalars are still as they were typed, and written.

What a scalar means is decided by the schema (`recipe.values`): `name: 7` is a text, `max_steps: 7` a number. Nothing is
interpolated. Left out of YAML: tags other than the plain ones, and keys that are given twice.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

_CORE = "tag:yaml.org,2002:"
_PLAIN = "plain"  # the tag of a scalar without quotes
_VALUE_TAGS = {_PLAIN, *(_CORE + kind for kind in ("int", "float", "bool", "null"))}
_MERGE = "<<"
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_DIGITS = 1000  # Python reads no integers of many more
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_BLANKS = " \t\r\n"  # what YAML takes for blank: a no-break space is a text
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

# names of LaTeX that double quotes make something else of, besides those that end in a control character
_LATEX = re.compile(r"\\((?:text\w*|times|theta|tau|triangle\w*|right\w*|rho|rangle|neq|nabla|notin)\b|[_NLP])")


@dataclass(frozen=True)
class Scalar:
    """A scalar as it was typed.

    Attributes:
        text: what it holds; of a quoted one without the quotes.
        plain: it stands without quotes, so a number or ``true`` may be meant.
        typed: it comes from a command line, where an empty text is a text.
        doubt: a name of LaTeX that the double quotes changed, for example ``\\times``.
    """

    text: str
    plain: bool = True
    typed: bool = False
    doubt: str = ""

    @property
    def is_null(self) -> bool:
        """Whether it is written as no value."""
        return self.plain and self.text.strip(_BLANKS) in ("~", "null", "Null", "NULL", *([] if self.typed else [""]))

    def value(self) -> Any:
        """Return what it is where the schema asks for no text: YAML 1.2's plain values, with two differences.

        Numbers that begin with zeros stay texts, and so does what is hexadecimal or octal.
        """
        text = self.text.strip(_BLANKS)
        if not self.plain or (self.typed and not text):
            return self.text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            return int(text) if len(text) < _DIGITS else text
        return float(re.sub(r"\.(?=[a-zA-Z])", "", text)) if _FLOAT.fullmatch(text) else self.text


Tree = Scalar | list[Any] | dict[str, Any]  # of trees


class BadYAML(ValueError):
    """A text is not YAML that a recipe may hold; the message names the line."""


class _Reader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML up to the tree of nodes; a scalar's tag only says whether it was quoted."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Return the tag of a node that has none."""
        if kind is ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


def read_yaml(text: str) -> Tree:
    """Return a YAML document as a tree; an empty one is an empty scalar.

    Raises:
        BadYAML: it is not YAML, has more than one document, a key twice, or a tag of its own.
    """
    try:
        node = _Reader(text).get_single_node()
        return Scalar("") if node is None else _tree(node, text, ())
    except RecursionError:
        raise BadYAML("lists or keys lie in each other too deep") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = int(str(error.character))  # PyYAML gives the code point
        raise BadYAML(f"line {line}: holds the control character U+{code:04X}; take it out") from None
    except yaml.MarkedYAMLError as error:
        raise BadYAML(_explained(error)) from None


_REMEDIES = {
    "mapping values are not allowed here": "a text that holds ': ' needs quotes around it",
    "expected <block end>, but found '<scalar>'": "a text that begins with a quote, { or [ needs quotes around it",
    "expected ',' or": "a text with { } [ ] or a comma inside of { } or [ ] needs quotes around it",
    "found unknown escape character": "a text with backslashes is written in single quotes",
    "that cannot start any token": "indent with spaces, and put a text that begins with such a character in quotes",
}


def _explained(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    problem = " ".join(str(error.problem or error.context or error).split())
    line = f"line {mark.line + 1}: " if mark else ""
    remedy = next((f"; {said}" for part, said in _REMEDIES.items() if part in problem), "")
    return f"{line}{problem}{remedy}"


def _tree(node: Node, text: str, above: tuple[Node, ...]) -> Tree:
    line = node.start_mark.line + 1
    if any(node is one for one in above):
        raise BadYAML(f"line {line}: an alias that holds itself")
    if isinstance(node, ScalarNode):
        if node.tag not in (*_VALUE_TAGS, _CORE + "str"):
            raise BadYAML(f"line {line}: the tag {_short(node.tag)} has no meaning in a recipe")
        raw = text[node.start_mark.index : node.end_mark.index] if node.style == '"' else ""
        doubt = _LATEX.search(raw.replace("\\\\", ""))
        return Scalar(node.value, node.tag in _VALUE_TAGS, doubt=doubt[0] if doubt else "")
    if node.tag not in (_CORE + "seq", _CORE + "map"):
        raise BadYAML(f"line {line}: the tag {_short(node.tag)} has no meaning in a recipe")
    if isinstance(node, SequenceNode):
        return [_tree(item, text, (*above, node)) for item in node.value]
    assert isinstance(node, MappingNode)
    return _mapping(node, text, (*above, node))


def _mapping(node: MappingNode, text: str, above: tuple[Node, ...]) -> dict[str, Tree]:
    mapping: dict[str, Tree] = {}
    merged: dict[str, Tree] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise BadYAML(f"line {line}: a key is one text, not a list or keys of its own")
        inside = _tree(value, text, above)
        if key.value == _MERGE and key.tag == _PLAIN:
            for part in inside if isinstance(inside, list) else [inside]:
                if not isinstance(part, dict):
                    raise BadYAML(f"line {line}: << takes keys with values")
                merged = {**part, **merged}
            continue
        if key.value in mapping:
            raise BadYAML(f"line {line}: the key {key.value!r} is given twice")
        mapping[key.value] = inside
    return {**merged, **mapping}


def _short(tag: str) -> str:
    return tag.replace(_CORE, "!!")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader, this one or YAML 1.1's, would take for something else."""


def _text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    # line feeds alone would be blank lines, which say nothing to a reader; in other texts an escape may be in doubt
    return dumper.represent_scalar(_CORE + "str", text, '"' if text.strip("\n") == "" != text else None)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver(_CORE + "float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def write_yaml(values: Any) -> str:
    """Return plain values as YAML that `read_yaml` and any reader of YAML read alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
