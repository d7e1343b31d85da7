"""Rewards of what a completion's text is: shipped, and made of their options.

Each function here takes the options of `rewards[].options` and returns a reward, so that a pattern
or a schema is read once. Wrong values of options are a ValueError that begins with the option's name.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import regex as regex_library

from lowmem_rlhf.data.values import is_missing, text_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.rewards.functions import begun_answers

_SECONDS = 1.0  # for a pattern on one text
_TAGS = ["think", "answer"]
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class TextReward:
    """A reward that judges each text, perhaps by what its row has in a column.

    Attributes:
        value: of a text and its reference (None without a column); None where the reward does not apply.
        column: of the references.
        reads: whether it can read a reference, which a run asks before it begins; None: any.
        remedy: what to do where it reads none of them.
    """

    value: Callable[[str, Any], float | None]
    column: str | None = None
    reads: Callable[[Any], bool] | None = None
    remedy: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that it needs."""
        return () if self.column is None else (self.column,)

    def __call__(self, texts: Sequence[str], **columns: Any) -> list[float | None]:
        """Return a value for each completion, given as a text."""
        references = [None] * len(texts) if self.column is None else columns[self.column]
        return [self.value(text, reference) for text, reference in zip(texts, references, strict=True)]


def exact_match(
    *,
    column: str = "answer",
    ignore_case: bool = False,
    strip: bool = True,
    whitespace: Literal["keep", "collapse"] = "keep",
) -> TextReward:
    """1.0 where the completion is the text in a column, otherwise 0.0.

    Args:
        column: the reference, or a list of them, of which one must match; a row without one has no value.
        ignore_case: compare without regard to case (Unicode's case folding).
        strip: leave out white space at both ends.
        whitespace: ``collapse``: a run of white space counts as one space.
    """

    def form(text: str) -> str:
        text = text.casefold() if ignore_case else text
        text = re.sub(r"\s+", " ", text) if whitespace == "collapse" else text
        return text.strip() if strip else text

    def value(text: str, reference: Any) -> float | None:
        references = [form(one) for one in _texts(reference)]
        return float(form(text) in references) if references else None

    return TextReward(value, column_named(column))


def contains(
    *,
    words: list[str] | None = None,
    column: str | None = None,
    match: Literal["any", "all"] = "any",
    ignore_case: bool = False,
) -> TextReward:
    """1.0 where the completion contains any (or all) of some texts, otherwise 0.0.

    Args:
        words: the texts, wherever they stand (``cat`` is in ``concatenate``).
        column: in place of words: a text of each row, or a list; a row without one has no value.
        match: whether one is enough.
        ignore_case: compare without regard to case.

    Raises:
        ValueError: not one of words and column is given, or a word is empty.
    """
    if (words is None) == (column is None):
        raise ValueError(f"words: got {words!r}, with column {column!r}; give one of the two")
    wanted = None if words is None else _words(words)
    enough = any if match == "any" else all

    def form(text: str) -> str:
        return text.casefold() if ignore_case else text

    def value(text: str, reference: Any) -> float | None:
        texts = wanted if wanted is not None else [one for one in _texts(reference) if one]
        return float(enough(form(one) in form(text) for one in texts)) if texts else None

    return TextReward(value, None if column is None else column_named(column))


def keywords(
    *,
    words: list[str],
    cap: int | None = None,
    count: Literal["distinct", "all"] = "distinct",
    ignore_case: bool = True,
) -> TextReward:
    """The number of keywords in the completion, up to a cap and divided by it: 0.0 to 1.0.

    Args:
        words: whole words or phrases; ``cat`` is not in ``concatenate``.
        cap: from which the value is 1.0; None: the number of words.
        count: ``distinct``: each keyword once; ``all``: every occurrence.
        ignore_case: count without regard to case.

    Raises:
        ValueError: there is no word, one is empty, or the cap is below 1.
    """
    words = list(dict.fromkeys(word.casefold() if ignore_case else word for word in _words(words)))
    most = len(words) if cap is None else cap
    if most < 1:
        raise ValueError(f"cap: got {cap!r}; give a whole number of at least 1")
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for word in words]

    def value(text: str, reference: Any) -> float:
        text = text.casefold() if ignore_case else text
        found = [len(pattern.findall(text)) for pattern in patterns]
        return min(sum(map(bool, found)) if count == "distinct" else sum(found), most) / most

    return TextReward(value)


def regex(*, pattern: str, full: bool = False, ignore_case: bool = False) -> TextReward:
    """1.0 where a regular expression matches the completion, otherwise 0.0.

    A text on which the search takes more than a second, as of patterns like ``(a|a)+$``, does not match.

    Args:
        pattern: in the syntax of Python's ``re`` (by the library ``regex``, whose search has a time limit).
        full: the pattern must match the whole text, not only a part of it.
        ignore_case: match without regard to case.

    Raises:
        ValueError: the pattern is no regular expression.
    """
    try:
        compiled = regex_library.compile(pattern, regex_library.IGNORECASE if ignore_case else 0)
    except (regex_library.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern: got {pattern!r}, which is no regular expression ({error}); mend it") from error

    def value(text: str, reference: Any) -> float:
        try:
            found = (compiled.fullmatch if full else compiled.search)(text, timeout=_SECONDS)
        except TimeoutError:
            return 0.0
        return float(found is not None)

    return TextReward(value)


def json_valid(*, schema: dict[str, Any] | None = None) -> TextReward:
    """1.0 where the completion, or the last block in it that is fenced by ```, is JSON (RFC 8259), otherwise 0.0.

    NaN and Infinity are no JSON.

    Args:
        schema: a JSON Schema that the value must also meet; references to other documents are not followed.

    Raises:
        ValueError: the schema is none, or refers to another document.
        UserError: the package jsonschema, which a schema needs, is not installed.
    """
    meets = (lambda value: True) if schema is None else _schema_check(schema)

    def value(text: str, reference: Any) -> float:
        for candidate in (text, *_FENCED.findall(text)[-1:]):
            try:
                parsed = json.loads(candidate, parse_constant=_no_json)
            except (ValueError, RecursionError):
                continue
            return float(meets(parsed))
        return 0.0

    return TextReward(value)


def tags(*, tags: list[str] = _TAGS) -> Callable[..., list[float | None]]:
    """1.0 where the completion has each tag once, opened and closed, one after another in this order; otherwise 0.0.

    What the prompt has of the answer counts, as of `think_format`: the first tag may be opened there.

    Args:
        tags: their names, without brackets: ``think`` is ``<think>...</think>``.

    Raises:
        ValueError: there is no tag, one comes twice, or a name has other signs than letters, digits, - and _.
    """
    if not tags or len(set(tags)) < len(tags):
        raise ValueError(f"tags: got {tags!r}; give one or more names, each once")
    if wrong := [name for name in tags if not re.fullmatch(r"[\w-]+", name)]:
        raise ValueError(f"tags: got {wrong[0]!r}; give a name such as 'think', without brackets")
    wanted = [mark for name in tags for mark in (f"<{name}>", f"</{name}>")]

    def in_order(text: str) -> bool:
        places = [text.find(mark) for mark in wanted]
        return all(text.count(mark) == 1 for mark in wanted) and places == sorted(places)

    def judge(
        texts: Sequence[str], prompt_texts: Sequence[str] = (), prompts: Sequence[Any] = (), **columns: Any
    ) -> list[float | None]:
        before = begun_answers(len(texts), prompt_texts, prompts, wanted[0])
        return [float(in_order(begun + text)) for begun, text in zip(before, texts, strict=True)]

    return judge


def column_named(name: str) -> str:
    """Return the value of an option `column`; ValueError where it names none."""
    if not name:
        raise ValueError("column: got ''; name a column of the data")
    return name


def _words(words: list[str]) -> list[str]:
    if not words or not all(word.strip() for word in words):
        raise ValueError(f"words: got {words!r}; give a list of one or more texts, none of them empty")
    return words


def _texts(reference: Any) -> list[str]:
    """Return the texts of a reference: of each item of a list."""
    items = reference if isinstance(reference, list) else [reference]
    return [text_of(item) for item in items if not is_missing(item)]


def _no_json(constant: str) -> Any:
    raise ValueError(constant)


def _schema_check(schema: dict[str, Any]) -> Callable[[Any], bool]:
    try:
        import jsonschema
        from referencing import Registry
    except ImportError as error:
        raise UserError(
            "rewards: json_valid: option schema: needs the package jsonschema, which is not installed; run `pip "
            "install jsonschema`, or leave the schema out"
        ) from error
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"schema: is no JSON Schema ({error.message}); mend it") from error
    if away := [one for one in _references(schema) if not one.startswith("#")]:
        raise ValueError(f"schema: refers to {away[0]!r}; write it out below $defs and refer to '#/$defs/NAME'")
    ready = validator(schema, registry=Registry())
    try:
        ready.is_valid({})
    except Exception as error:  # of the library's resolver: no such part of the schema
        raise ValueError(f"schema: cannot be followed ({error}); mend its $ref") from error
    return lambda value: bool(ready.is_valid(value))


def _references(schema: Any) -> list[str]:
    """Return what a schema's ``$ref`` and ``$dynamicRef`` name, wherever they stand."""
    if isinstance(schema, list):
        return [one for part in schema for one in _references(part)]
    if not isinstance(schema, dict):
        return []
    own = [str(schema[key]) for key in ("$ref", "$dynamicRef") if isinstance(schema.get(key), str)]
    return own + [one for part in schema.values() for one in _references(part)]
