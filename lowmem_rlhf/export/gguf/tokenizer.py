"""The metadata of a tokenizer in a GGUF, from the tokenizer that the run trained with.

Everything is read from the fast tokenizer that transformers makes of the folder, so a GGUF tokenizes as training did.
llama.cpp has the splitting of text built in and only its name is stored, so it is recognised by its parts; a tokenizer
that it would treat otherwise is refused.
"""

import json
from typing import Any

from gguf import TokenType

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.tokenizer import WAY_OUT, chat_template, own_frame

Keys = dict[str, Any]
ADD_BOS, ADD_EOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
_NEVER = -1e6  # the score of a token that no merge makes; ranks of merges lie above it
_NO_MERGE = ("ÿ", "ÿ")  # of two bytes 255, which no text has: llama.cpp loads no tokenizer without a merge
_SPACE = "▁"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.json's splitting expression -> llama.cpp's name of it (llama-vocab.cpp: llm_tokenizer_bpe)
_SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}": "tekken",
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}": "gpt-4o",
}
_IGNORES_MERGES = ("llama-bpe", "tekken")  # words that are tokens stay whole, whatever the merges say


def describe_tokenizer(tokenizer: Any, rows: int, extra_stop: int | None = None, add_bos: bool | None = None) -> Keys:
    """Return the metadata of a tokenizer.

    Args:
        rows: of the embedding. Tokens beyond them cannot be used and are left out; rows without a token get a name.
        extra_stop: a second token that ends an answer, beside the tokenizer's own.
        add_bos: a BOS is put before every text; None: where the tokenizer does so.

    Raises:
        UserError: llama.cpp would tokenize otherwise.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _unknown(f"it is a {model['type']} tokenizer")
    splits, rewrites = _flat(content["pre_tokenizer"], "pretokenizers"), _flat(content["normalizer"], "normalizers")
    byte_level = any(part["type"] == "ByteLevel" for part in splits)
    keys = _byte_level(model, splits, rewrites) if byte_level else _sentencepiece(model, splits, rewrites)
    names, types = _tokens(content, rows, byte_level)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if byte_level:
        keys["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges or [_NO_MERGE]]
    else:
        keys["tokenizer.ggml.scores"] = _scores(model, merges, names)
    keys |= {"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": types}
    return keys | _special(tokenizer, rows, extra_stop, add_bos)


def _unknown(why: str) -> UserError:
    return UserError(f"llama.cpp's form of this tokenizer is not known here: {why}; {WAY_OUT}")


def _flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, with sequences flattened."""
    if part is None:
        return []
    return [step for one in part[inner] for step in _flat(one, inner)] if part["type"] == "Sequence" else [part]


def _byte_level(model: dict[str, Any], splits: list[dict[str, Any]], rewrites: list[dict[str, Any]]) -> Keys:
    if strange := [part["type"] for part in rewrites if part["type"] != "NFC"]:  # which ordinary text is in already
        raise _unknown(f"it rewrites text by {strange[0]}")
    *before, last = splits
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unknown("it puts a space before every text, or splits after the step to bytes")
    name = None
    if last["use_regex"]:
        digits = [part["type"] == "Digits" and part["individual_digits"] for part in before]
        name = "gpt-2" if not digits else "smollm" if digits == [True] else None
    elif len(before) == 1 and before[0]["type"] == "Split" and before[0]["behavior"] in ("Isolated", "Removed"):
        pattern = before[0]["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        if before[0]["behavior"] == "Isolated" or before[0]["invert"]:
            name = _SPLITS.get(pattern)
    if name is None:
        raise _unknown("it splits text in a way that is not in the list")
    if (name in _IGNORES_MERGES) != bool(model.get("ignore_merges")):
        if name != "llama-bpe":
            raise _unknown(f"it splits text as {name} does and treats merges otherwise")
        name = "dbrx"  # the same expression, and merges in their order
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}


def _sentencepiece(model: dict[str, Any], splits: list[dict[str, Any]], rewrites: list[dict[str, Any]]) -> Keys:
    """SentencePiece's BPE in tokenizer.json's form: spaces become ▁, unknown characters become bytes."""
    to_space = [part for part in rewrites if part["type"] == "Replace" and part["content"] == _SPACE]
    metaspace = [part for part in splits if part["type"] == "Metaspace"]
    prepend = [part for part in rewrites if part["type"] == "Prepend"]
    known = len(to_space) + len(prepend) == len(rewrites)
    others = [part for part in splits if part["type"] not in ("Metaspace", "Split")]
    if not model["byte_fallback"] or not (to_space or metaspace) or others or not known:
        raise _unknown("it is neither byte-level BPE nor SentencePiece's BPE with bytes for unknown characters")
    prefix = bool(prepend) or any(part["prepend_scheme"] != "never" for part in metaspace)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _tokens(content: dict[str, Any], rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Return each row's token and type."""
    names = [f"[PAD{index}]" for index in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    model = content["model"]
    for token, index in model["vocab"].items():
        if index >= rows:
            raise UserError(
                f"the tokenizer has a token {token!r} of number {index}, and the embedding only {rows} rows"
            )
        kind = TokenType.NORMAL
        if not byte_level:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            kind = TokenType.BYTE if is_byte else TokenType.UNKNOWN if token == model["unk_token"] else kind
        names[index], types[index] = token, int(kind)
    for token in content["added_tokens"] or []:
        index, text = token["id"], token["content"]
        if index < rows and types[index] != TokenType.UNKNOWN:
            names[index] = text if token["special"] else text.replace(_SPACE, " ")
            types[index] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    return names, types


def _scores(model: dict[str, Any], merges: list[list[str]], names: list[str]) -> list[float]:
    """Return the scores by which llama.cpp chooses the next merge: the rank of the first merge that makes a token.

    tokenizer.json lists merges by SentencePiece's own score of what they make, so the order is that of tokenizer.model.
    """
    first: dict[int, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(model["vocab"][left + right], rank)
    return [float(-first[index]) if index in first else _NEVER for index in range(len(names))]


def _special(tokenizer: Any, rows: int, extra_stop: int | None, add_bos: bool | None) -> Keys:
    """Return the ids of special tokens, which of them frame a text, and the chat template.

    An EOS is never put behind a text: what is sent to a model is a prompt, which goes on.
    """
    own, _ = own_frame(tokenizer)
    keys: Keys = {ADD_BOS: own if add_bos is None else add_bos, ADD_EOS: False}
    stop = extra_stop if extra_stop != tokenizer.eos_token_id else None
    ids = {
        "bos": tokenizer("a")["input_ids"][0] if own else tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": stop,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    keys |= {f"tokenizer.ggml.{name}_token_id": one for name, one in ids.items() if one is not None and one < rows}
    if template := chat_template(tokenizer):
        keys["tokenizer.chat_template"] = template
    return keys
