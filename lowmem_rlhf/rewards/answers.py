"""Finding the final answer in a text and comparing it with a reference.

Only a stated value counts: `5 + 3` is not an answer to "what is 5 + 3", so repeating the question earns nothing. Plain
numbers never reach math-verify, and what does is short LaTeX of a few harmless commands, because its time limits need
signals (main thread, not Windows) and a power tower would compute for ever.
"""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal

_EXPONENT = r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
_DIGITS = rf"(?:(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+){_EXPONENT}(?:/[0-9]+)?"
# A sign belongs to a number unless it stands after an operand, as in `9-4` or `9 -4`.
_NUMBER = re.compile(rf"(?:(?<![0-9)])(?<![0-9)]\s)-)?(?:[$€£]-?)?{_DIGITS}")
_WHOLE_NUMBER = re.compile(rf"(-?)[$€£]?(-?)({_DIGITS})\.?%?\.?")
_OPERATOR = r"(?:\*\*|[-+*/×·÷^x]|\\times|\\cdot|\\div)"
_OPERATOR_BEFORE = re.compile(rf"[0-9)]\s*{_OPERATOR}\s*[({{]*\s*$")
_OPERATOR_AFTER = re.compile(rf"\s*{_OPERATOR}\s*[$€£({{]*[0-9]|,[0-9]")
# Two stars are a power between operands, as in `9**2` and `9 ** 2`, and Markdown's bold type everywhere else.
_POWER_OR_BOLD = re.compile(r"((?<=[0-9)])\*\*(?=[-0-9(])|(?<=[0-9)]\s)\*\*(?=\s[-0-9(]))|\*\*")
_ANSWER_IS = re.compile(r"\banswer\b(?:\s+is|\s*[:=])+\s*", re.IGNORECASE)
_HARMLESS_LATEX = re.compile(r"-?[0-9]*(?:\\[dt]?frac\{-?[0-9]{1,12}\}\{[0-9]{1,12}\}|\\sqrt\{[0-9]{1,12}\}|\\pi)")
_LATEX_NOISE = re.compile(r"\\(?:[,;!:() \[\]]|left|right|displaystyle|(?:text|mathrm|mathbf)\{[^{}]*\})")
_LONGEST = 64  # characters of a number, or of LaTeX given to math-verify
_POWER_OF_TEN = re.compile(
    r"([0-9])\s*(?:\\times|\\cdot|[×·x*])\s*10\s*(?:\^|\*\*)\s*\{?\s*([-+]?[0-9]{1,3})(?![0-9])\s*\}?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}")

Take = Literal["stated", "boxed", "tag", "last"]


def parse_number(text: str) -> Fraction | None:
    """Return the value of a text that is just one number: ``-1,000``, ``$18``, ``18.0``, ``1e3``, ``3/4``, ``20%``.

    What stands before a percent sign is the value.
    """
    match = _WHOLE_NUMBER.fullmatch(text.strip().replace("−", "-"))
    if match is None or len(text) > _LONGEST or (match[1] and match[2]):
        return None
    try:
        return Fraction(match[1] + match[2] + match[3].replace(",", ""))
    except (ValueError, ZeroDivisionError):  # 1.5/2, 1/0
        return None


def stated_answer(text: str) -> str | None:
    r"""Return the final answer that a completion states, as a piece of its text.

    What follows the last ``####``; otherwise the last ``\boxed{}``; otherwise what follows the last "answer is" or
    "answer:"; otherwise the last number. Reasoning up to ``</think>`` is not looked at. None where nothing is stated.
    """
    text = _answer_part(text)
    if "####" in text:
        return _value_in(text.rpartition("####")[2].strip().split("\n")[0])
    if (boxed := _last_boxed(text)) is not None:
        return _value_in(boxed)
    markers = list(_ANSWER_IS.finditer(text))
    if markers and (value := _value_in(text[markers[-1].end() :].split("\n")[0])) is not None:
        return value
    return _last_number(text)


def answer_in(text: str, take: Take, tag: str = "answer") -> str | None:
    r"""Return the final answer of a completion, as a piece of its text with powers of ten as exponents.

    Args:
        text: of the completion; reasoning up to ``</think>`` is not looked at.
        take: ``stated``: see `stated_answer`; ``boxed``: what the last ``\boxed{}`` holds; ``tag``: what is stated in
            the last ``<tag>...</tag>``; ``last``: the last number.
        tag: its name, without brackets.
    """
    text = _POWER_OF_TEN.sub(r"\1e\2", _answer_part(text))
    if take == "boxed":
        boxed = _last_boxed(text)
        return None if boxed is None else _value_in(boxed)
    if take == "tag":
        before, closed, _ = text.rpartition(f"</{tag}>")
        _, opened, inside = before.rpartition(f"<{tag}>")
        return (_value_in(inside) or stated_answer(inside)) if closed and opened else None
    return _last_number(text) if take == "last" else stated_answer(text)


def within(reference: str, answer: str | None, absolute: float, relative: float) -> bool:
    """Return whether an answer is at most so far from a reference: by a number, or by a share of the reference."""
    if answer is None or (expected := value_of(reference)) is None or (got := value_of(answer)) is None:
        return False
    return abs(got - expected) <= max(Fraction(str(absolute)), Fraction(str(relative)) * abs(expected))


def value_of(text: str) -> Fraction | None:
    r"""Return the value of a number or of harmless LaTeX; of ``\sqrt{2}`` and ``\pi`` as exact as a float is."""
    if (number := parse_number(text)) is not None:
        return number
    text = text.replace(" ", "")
    if len(text) > _LONGEST or _HARMLESS_LATEX.fullmatch(text) is None:
        return None
    sign, text = (-1, text[1:]) if text.startswith("-") else (1, text)
    factor, slash, rest = text.partition("\\")
    if match := _FRACTION.fullmatch(slash + rest):
        if int(match[2]) == 0:
            return None
        value = Fraction(int(match[1]), int(match[2]))  # of 1\frac{1}{2}, a mixed number, it is added
        return sign * (int(factor) + value if factor else value)
    other = math.pi if rest == "pi" else math.sqrt(int(rest.removeprefix("sqrt{").removesuffix("}")))
    return sign * int(factor or 1) * Fraction(other)


def same_value(reference: str, answer: str | None) -> bool:
    """Return whether two answers have the same value: exact for numbers, math-verify for LaTeX; never raises."""
    if answer is None:
        return False
    expected, got = parse_number(reference), parse_number(answer)
    if expected is not None and got is not None:
        return expected == got
    if reference.strip() == answer.strip():
        return True
    return _comparable(reference) and _comparable(answer) and _verify(reference, answer)


def is_answer(reference: Any) -> bool:
    """Return whether a reference is something that an answer can be compared with."""
    return reference is not None and _comparable(str(reference))


def _answer_part(text: str) -> str:
    return _POWER_OR_BOLD.sub(r"\1", text.rpartition("</think>")[2].replace("−", "-"))


def _last_number(text: str) -> str | None:
    matches = list(_NUMBER.finditer(text))
    return _unless_operand(text, matches[-1]) if matches else None


def _value_in(piece: str) -> str | None:
    """Return the value that a short piece states: LaTeX as it is, or the first number, best after an ``=``."""
    piece = piece.replace(r"\$", "$").replace(r"\%", "%").replace("{,}", ",")
    if "\\" in piece:
        latex = _LATEX_NOISE.sub("", piece).strip().strip("$").rstrip(".").rpartition("=")[2].strip()
        if _comparable(latex):
            return latex
        piece = latex
        if "\\" in piece:
            return None
    for part in (piece.rpartition("=")[2], piece):
        match = _NUMBER.search(part)
        if match and (value := _unless_operand(part, match)) is not None:
            return value
    return None


def _unless_operand(text: str, match: re.Match[str]) -> str | None:
    """Return the number, or None where it is a part of an expression that was left uncomputed."""
    before = text[max(0, match.start() - 12) : match.start()]
    if _OPERATOR_BEFORE.search(before) or _OPERATOR_AFTER.match(text, match.end()):
        return None
    return match.group()


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` whose braces close, or None."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for index in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : index]
    return None


def _comparable(text: str) -> bool:
    short = len(text) <= _LONGEST
    return parse_number(text) is not None or (short and _HARMLESS_LATEX.fullmatch(text.replace(" ", "")) is not None)


def _verify(reference: str, answer: str) -> bool:
    from math_verify import parse, verify

    with _unwarned():
        gold, got = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
        return bool(gold and got and verify(gold, got, timeout_seconds=None))


@contextmanager
def _unwarned() -> Iterator[None]:
    """Keep math-verify from warning that its time limit is off, which is meant."""
    loggers = [logging.getLogger(name) for name in ("math_verify.parser", "math_verify.grader")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
