"""What ends a completion beside its length: the model's stop tokens, and the recipe's stop strings.

A stop string is looked for in the bytes of the tokens as they come, so a completion ends with the first token that
completes one, however often somebody looks at what was written. The text stays, with whatever that token holds behind
it, as transformers' StopStringCriteria has it; it goes by bytes too. Unlike there, a text that begins in the prompt is
none: what is judged and returned is the completion.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.rollout.sampling import Sampling

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase

Ended = Callable[[int], bool]  # told the tokens of one completion in turn; True for the one that ends it

_BEFORE = "abcdef"  # a text that stands before a token, which may be written another way at the beginning


class Ends:
    """The ends of completions.

    Args:
        base: whose stop tokens they are, and whose tokenizer knows the text of a token.
        sampling: has the stop strings.
    """

    def __init__(self, base: "SharedBase", sampling: Sampling) -> None:
        self._stops = base.stop_ids
        self._strings = [text.encode() for text in sampling.stop_strings]
        self._bytes = TokenBytes(base.tokenizer) if self._strings else None

    def of_one(self) -> Ended:
        """Return what follows one completion."""
        if self._bytes is None:
            return self._stops.__contains__
        tail, longest, text_of = b"", max(map(len, self._strings)), self._bytes

        def ended(token: int) -> bool:
            nonlocal tail
            text = tail + text_of[token]
            tail = text[-(longest - 1) :] if longest > 1 else b""
            return token in self._stops or any(string in text for string in self._strings)

        return ended


class TokenBytes(dict[int, bytes]):
    """The bytes that each token stands for within a text, by its id; made when they are first asked for.

    Args:
        tokenizer: a fast tokenizer tells its decoder: with bytes as letters (GPT-2) or as tokens ``<0x0A>`` (Llama 2)
            a token may be a part of a character.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer, kinds = tokenizer, _decoder_kinds(tokenizer)
        self._letters = _byte_letters() if "ByteLevel" in kinds else {}
        self._fallback = "ByteFallback" in kinds
        self._before: list[str] = tokenizer.convert_ids_to_tokens(
            tokenizer(_BEFORE, add_special_tokens=False).input_ids
        )
        self._skipped = len(tokenizer.convert_tokens_to_string(self._before))

    def __missing__(self, token: int) -> bytes:
        """Return the bytes of a token; of one that the tokenizer does not know, none."""
        self[token] = found = self._made(self._tokenizer.convert_ids_to_tokens(token))
        return found

    def _made(self, name: str | None) -> bytes:
        if not name:
            return b""
        if self._letters and all(letter in self._letters for letter in name):
            return bytes(self._letters[letter] for letter in name)
        if self._fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)):
            return bytes.fromhex(byte[1])
        return str(self._tokenizer.convert_tokens_to_string([*self._before, name]))[self._skipped :].encode()


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """Return the kinds of a fast tokenizer's decoder and its parts; none of one that has no decoder."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return set() if decoder is None else set(_kinds(json.loads(decoder.__getstate__())))


def _kinds(state: Any) -> Sequence[str]:
    if isinstance(state, dict):
        return [str(state.get("type")), *_kinds(list(state.values()))]
    return [kind for one in state for kind in _kinds(one)] if isinstance(state, list) else []


def _byte_letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
