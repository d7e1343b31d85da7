"""Rewards of a completion's tokens: shipped, and made of their options as those of `texts` are."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

Penalty = Callable[..., list[float | None]]


def soft_overlong(*, max_completion_len: int, soft_punish_cache: int) -> Penalty:
    """0.0 up to max_completion_len - soft_punish_cache tokens, falling in a line to -1.0 at max_completion_len.

    DAPO's length shaping (arXiv 2503.14476, eq. 13), TRL's `get_soft_overlong_punishment`. Tokens are those that were
    generated, the stop among them.

    Args:
        max_completion_len: in tokens; what is longer gets -1.0.
        soft_punish_cache: the tokens before it over which the value falls; 0: it falls at once.

    Raises:
        ValueError: a length is out of its range.
    """
    if max_completion_len < 1:
        raise ValueError(f"max_completion_len: got {max_completion_len}; give a number of tokens, at least 1")
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache: got {soft_punish_cache}; give a number of tokens from 0 to max_completion_len "
            f"({max_completion_len})"
        )

    def value(length: int) -> float:
        over = length - (max_completion_len - soft_punish_cache)
        if over <= 0:
            return 0.0
        return -1.0 if length > max_completion_len else -over / soft_punish_cache

    def penalties(completion_ids: Sequence[list[int]], **columns: Any) -> list[float | None]:
        return [value(len(ids)) for ids in completion_ids]

    return penalties


def repetition(
    *, ngram_size: int = 3, max_penalty: float = -1.0, unit: Literal["tokens", "words"] = "tokens"
) -> Penalty:
    """The share of n-grams that repeat an earlier one, 1 - distinct / all, times max_penalty.

    From appendix C.2 of arXiv 2502.03373: of tokens as TRL's `get_repetition_penalty_reward` has it, of words as
    open-r1 has it. A completion shorter than an n-gram gets 0.0.

    Args:
        ngram_size: tokens or words of an n-gram.
        max_penalty: what a text of repetitions alone comes close to, at most 0.
        unit: ``words``: what white space separates, in small letters.

    Raises:
        ValueError: ngram_size is below 1, or max_penalty above 0.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size: got {ngram_size}; give a whole number of at least 1")
    if max_penalty > 0:
        raise ValueError(f"max_penalty: got {max_penalty:g}; give a number of at most 0")

    def value(parts: Sequence[Hashable]) -> float:
        count = len(parts) - ngram_size + 1
        if count < 1:
            return 0.0
        distinct = {tuple(parts[start : start + ngram_size]) for start in range(count)}
        return (1 - len(distinct) / count) * max_penalty + 0.0  # no negative zero

    def penalties(texts: Sequence[str], completion_ids: Sequence[list[int]], **columns: Any) -> list[float | None]:
        return [value(ids) for ids in completion_ids] if unit == "tokens" else [value(_words(text)) for text in texts]

    return penalties


def _words(text: str) -> list[str]:
    return text.lower().split()
