"""A reward of the language that a completion is in: shipped, and made of its options as those of `texts` are."""

import re
from functools import lru_cache
from typing import Any, Literal

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.rewards.texts import TextReward
from lowmem_rlhf.suggest import did_you_mean

_LEAST = 30  # bytes (UTF-8) of letters from which a language can be told; a stretch of text has at least so many
_NO_LANGUAGE = "zxx"  # py3langid's label of what is none
_NOISE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+|https?://\S+|</?\w+>", re.DOTALL
)
_FORMULA = re.compile(r"\$[^$\n]*\$")
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?…])\s+|(?<=[。！？])")


def language(
    *, language: str, score: Literal["fraction", "check"] = "fraction", among: list[str] | None = None
) -> TextReward:
    """The share of the completion's text that is in a language, 0.0 to 1.0; or 1.0 where the text as a whole is.

    The language is told by py3langid, sentence by sentence, short ones with the next. Code between ` or ```, formulas,
    addresses and tags do not count. A text with hardly a sentence of letters has no value.

    Args:
        language: its code (ISO 639-1), such as ``de``.
        score: ``check``: 1.0 or 0.0 for the text as a whole.
        among: the codes of the languages that may occur; the fewer there are, the more surely each is told.

    Raises:
        ValueError: a language is unknown, or among does not have the wanted one and another.
        UserError: the package py3langid is not installed.
    """
    labels = [label for label in _identifier().labels if label != _NO_LANGUAGE]
    for name, codes in (("language", [language]), ("among", among or [])):
        for code in codes:
            if code not in labels:
                raise ValueError(
                    f"{name}: got {code!r}; give a code of ISO 639-1 that py3langid knows, such as 'en'"
                    f"{did_you_mean(code, labels)}"
                )
    if among is not None and not {language} < set(among):
        raise ValueError(f"among: got {among!r}; give {language!r} and the others that may occur")
    candidates = frozenset(labels if among is None else among)

    def value(text: str, reference: Any) -> float | None:
        parts = stretches(text)
        if not parts:
            return None
        if score == "check":
            return float(_told("\n".join(parts), candidates) == language)
        sizes = [letters(part) for part in parts]
        right = [size for part, size in zip(parts, sizes, strict=True) if _told(part, candidates) == language]
        return sum(right) / sum(sizes)

    return TextReward(value)


def stretches(text: str) -> list[str]:
    """Return the sentences of a text, short ones joined with what follows them; none where the whole text is short."""
    text = _FORMULA.sub(lambda match: " " if re.search(r"[\\^_={}+]", match[0]) else match[0], _NOISE.sub(" ", text))
    found: list[str] = []
    waiting = ""
    for sentence in filter(None, _SENTENCE_END.split(text)):
        waiting = f"{waiting} {sentence}".strip()
        if letters(waiting) >= _LEAST:
            found.append(waiting)
            waiting = ""
    if waiting and found:
        found[-1] += f" {waiting}"
    return found


def letters(text: str) -> int:
    """Return how many bytes the letters of a text have: a word has about as many in most scripts."""
    return sum(len(one.encode("utf-8", "surrogatepass")) for one in text if one.isalpha())


def _told(text: str, candidates: frozenset[str]) -> str:
    return next((label for label, _ in _identifier().rank(text) if label in candidates), "")


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(
            "rewards: language needs the package py3langid, which is not installed; run: pip install py3langid"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)
