"""Answers to tasks of reasoning-gym that are evaluated, as Python or by sympy, to be scored.

A model may write anything: ``9**9**9**9`` would compute for ever and let nothing else run, ``exit()`` end the run. Such
an answer is wrong, and is not evaluated.
"""

import re

LONGEST = 2000  # characters
_AS_PYTHON = {"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"}  # their answers are lists
_AS_NUMBER = {"countdown", "puzzle24"}  # their answers have the four operations and brackets
_AS_FORMULA = {"simple_integration", "intermediate_integration", "polynomial_multiplication"}
_FUNCTIONS = r"(?:sqrt|exp|log|ln|sin|cos|tan|sec|csc|cot|a?sinh?|a?cosh?|a?tanh?|asec|Abs|abs)"
_CALL = re.compile(rf"(?<![A-Za-z_])(?!{_FUNCTIONS}\s*\()[A-Za-z_]\w*\s*\(")
_POWER = re.compile(r"\*\*|\^")
_SMALL_POWER = re.compile(
    r"(?:\*\*|\^)\s*(?:-?\d{1,2}(?![\d.])|[A-Za-z]\w{0,3}(?!\w)|\(\s*-?\w{1,3}(?:\s*[-+/*]\s*\w{1,3})?\s*\))"
    r"(?!\s*(?:\*\*|\^|\())"
)
_MOST_POWERS_OF_BRACKETS = 2  # such as ((x + 1)**2)**3, with exponents of two digits


def is_evaluable(task: str, answer: str) -> bool:
    """Return whether an answer may be given to the scoring of a task: for tasks that do not evaluate any may."""
    if task in _AS_PYTHON:
        return len(answer) <= LONGEST and not re.search(r"[(*<]|__|\blambda\b", answer)
    if task in _AS_NUMBER:
        return len(answer) <= LONGEST and not (_POWER.search(answer) or re.search(r"[A-Za-z_]\w*\s*\(|!|__", answer))
    if task not in _AS_FORMULA:
        return True
    brackets = len(re.findall(r"\)\s*(?:\*\*|\^)", answer))
    return (
        len(answer) <= LONGEST
        and not re.search(r"!|__", answer)
        and not _CALL.search(answer)
        and len(_POWER.findall(answer)) == len(_SMALL_POWER.findall(answer))
        and brackets <= _MOST_POWERS_OF_BRACKETS
    )
