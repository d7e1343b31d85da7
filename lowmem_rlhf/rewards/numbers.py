"""A reward of a number that is right within a tolerance: shipped, and made of its options as those of `texts` are."""

import math
import re
from typing import Any

from lowmem_rlhf.rewards.answers import Take, answer_in, same_value, within
from lowmem_rlhf.rewards.functions import gsm8k_value
from lowmem_rlhf.rewards.texts import TextReward, column_named

_REMEDY = "it compares numbers and short LaTeX: name a column of such answers in its option column"


def numbers(
    *, column: str = "answer", relative: float = 0.0, absolute: float = 0.0, take: Take = "stated", tag: str = "answer"
) -> TextReward:
    r"""1.0 where the number that the completion states is the one in a column, within a tolerance; otherwise 0.0.

    Numbers are compared as exact fractions, and LaTeX as `gsm8k_answer` does; of LaTeX what is read is short and
    harmless, so that no answer computes for long. ``9**9`` is an expression and no answer.

    Args:
        column: the reference, or GSM8K's solution with the value behind ``####``; a row without a number has no value.
        relative: how far the number may be from the reference, as a share of the reference.
        absolute: or by how much; the larger of both counts, as in ``math.isclose``.
        take: ``stated``: the final answer as `gsm8k_answer` finds it; ``boxed``: the last ``\boxed{}`` alone; ``tag``:
            the last ``<tag>...</tag>`` alone; ``last``: the last number.
        tag: its name, without brackets, for ``take: tag``.

    Raises:
        ValueError: a tolerance is negative or no number, or the tag's name has other signs than letters, digits, - and
            _.
    """
    for name, tolerance in (("relative", relative), ("absolute", absolute)):
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"{name}: got {tolerance!r}; give a number of at least 0")
    if not re.fullmatch(r"[\w-]+", tag):
        raise ValueError(f"tag: got {tag!r}; give a name such as 'answer', without brackets")

    def value(text: str, reference: Any) -> float | None:
        if (expected := gsm8k_value(reference)) is None:
            return None
        answer = answer_in(text, take, tag)
        return float(same_value(expected, answer) or within(expected, answer, absolute, relative))

    return TextReward(value, column_named(column), reads=lambda one: gsm8k_value(one) is not None, remedy=_REMEDY)
