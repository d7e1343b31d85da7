"""The tokens that end a turn, and a completion's text without them. No torch here.

An answer ends with the token that the chat template writes after one in a conversation, whatever the tokenizer calls
its EOS (a base model's ends documents), or with one of the ends that the model's configurations name.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

# Words that no template contains, changes or splits at.
_SYSTEM, _ASKED, _ANSWERED, _AGAIN, _LAST, _THOUGHT = "qzsys", "qzask", "qzanswer", "qzmore", "qzlast", "qzwhy"
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names that templates have for it


def stop_ids_of(
    tokenizer: Any, config: Any, generation_config: Any, turn_ends: frozenset[int] | None = None
) -> frozenset[int]:
    """Return every token id at which a model ends a text or a turn.

    Args:
        config: the model's; its text part counts where it reads more than text.
        generation_config: the model's; may be None.
        turn_ends: what `turn_end` gives, where that is known.
    """
    ids = set(turn_end(tokenizer) if turn_ends is None else turn_ends)
    for value in (
        getattr(generation_config, "eos_token_id", None),
        getattr(config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        ids.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(ids)


def turn_end(tokenizer: Any, **chat_template_kwargs: Any) -> frozenset[int]:
    """Return the tokens that the chat template writes behind an assistant's answer: within a conversation, and last.

    It is the first special or added token there, of several in a row the tokenizer's own end. Where nothing ends a
    turn that is the token which begins the next one (GLM-4). A beginning of the text ends nothing, and neither does a
    token that also stands between reasoning and answer (gpt-oss's ``<|end|>``). Empty where there is no such token, no
    template, or the template takes no conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    for messages in _conversations():
        with suppress(Exception):  # whatever a template raises: it takes no such conversation
            text = _rendered(tokenizer, messages, chat_template_kwargs)
            behind = list(_behind_answers(text, messages))
            ends = {end for part in behind if (end := _end_in(part, tokenizer)) is not None}
            return frozenset(ends - _inside_turns(tokenizer, messages, chat_template_kwargs)) if ends else frozenset()
    return frozenset()


def written_text(tokenizer: Any, ids: Sequence[int], stops: frozenset[int]) -> str:
    """Return what a model wrote: the text of its tokens, special ones included, less the stop at the end."""
    written = ids[:-1] if ids and ids[-1] in stops else ids
    return str(tokenizer.decode(list(written), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def text_ids(tokenizer: Any, text: str, stops: frozenset[int]) -> list[int]:
    """Return the ids of a text that goes on: begun as the tokenizer begins one, without the end that some put behind.

    An end that is written out in the text stays.
    """
    return without_end(tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"], stops)


def without_end(ids: Sequence[int], bare: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the ids of a text without what the tokenizer put behind it.

    Args:
        ids: with the tokenizer's own tokens.
        bare: of the text alone.
        ends: what may stand behind it.
    """
    shortened, bare = list(ids), list(bare)
    while len(shortened) > len(bare) and shortened[-1] in ends and shortened[len(shortened) - len(bare) :] != bare:
        shortened.pop()
    return shortened


def _conversations() -> Iterator[list[dict[str, Any]]]:
    """Yield conversations, the simplest last that a template may want: with parts, with a system text, of one turn."""
    two = [("user", _ASKED), ("assistant", _ANSWERED), ("user", _AGAIN), ("assistant", _LAST)]
    for roles in (two, [("system", _SYSTEM), *two], two[2:]):
        yield [{"role": role, "content": text} for role, text in roles]
        yield [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in roles]


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, **kwargs))


def _behind_answers(text: str, messages: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what stands behind each answer, up to what is asked next; ValueError where an answer is not there."""
    if len(messages) > 2:
        start = text.rindex(_ANSWERED) + len(_ANSWERED)
        yield text[start : text.index(_AGAIN, start)]
    yield text[text.rindex(_LAST) + len(_LAST) :]


def _end_in(text: str, tokenizer: Any) -> int | None:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if str(token).strip(" \n\r\t▁")}
    special.discard(tokenizer.unk_token_id)  # stands for any text that has no token
    start = next((position for position, index in enumerate(ids) if index in special), None)
    if start is None:
        return None
    end = next((position for position in range(start, len(ids)) if ids[position] not in special), len(ids))
    eos = tokenizer.eos_token_id
    turn_end_id = eos if eos in ids[start:end] else ids[start]
    return None if turn_end_id == tokenizer.bos_token_id and turn_end_id != eos else int(turn_end_id)


def _inside_turns(tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> set[int]:
    """Return the tokens that stand between the reasoning and the answer of one turn."""
    tokens: set[int] = set()
    for name in _REASONING:
        with suppress(Exception):  # no template has to know it
            text = _rendered(tokenizer, [*messages[:-1], {**messages[-1], name: _THOUGHT}], kwargs)
            between = text[text.rindex(_THOUGHT) + len(_THOUGHT) : text.rindex(_LAST)]
            tokens.update(tokenizer(between, add_special_tokens=False)["input_ids"])
    return tokens
