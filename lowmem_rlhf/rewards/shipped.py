"""The rewards that ship with the package, by name."""

from collections.abc import Callable
from typing import Any

from lowmem_rlhf.rewards.code_tests import code_tests
from lowmem_rlhf.rewards.functions import (
    arithmetic_answer,
    gsm8k_answer,
    length,
    reasoning_gym_answer,
    think_format,
)
from lowmem_rlhf.rewards.judge import judge
from lowmem_rlhf.rewards.language import language
from lowmem_rlhf.rewards.numbers import numbers
from lowmem_rlhf.rewards.shaping import repetition, soft_overlong
from lowmem_rlhf.rewards.texts import contains, exact_match, json_valid, keywords, regex, tags

# called with completions, columns and options
FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (arithmetic_answer, gsm8k_answer, think_format, length, reasoning_gym_answer)
}
# called once with the options; what they return is called with texts and columns
FACTORIES: dict[str, Callable[..., Any]] = {
    factory.__name__: factory
    for factory in (
        *(exact_match, contains, keywords, regex, json_valid, tags, numbers),
        *(code_tests, judge, language, soft_overlong, repetition),
    )
}
SHIPPED: dict[str, Callable[..., Any]] = {**FUNCTIONS, **FACTORIES}
# of the others 1 means right, less wrong
GRADED = frozenset(("length", "keywords", "soft_overlong", "repetition", "judge", "language"))
