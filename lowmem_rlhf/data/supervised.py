"""From rows to what is learned without sampling: completions for SFT, preference pairs, labelled texts.

A prompt is the one that rollouts of the same recipe start from, token for token, so that a later online run goes on
from exactly what was learned here. Prompt and completion are therefore tokenized apart. Left out: learning from every
answer of a conversation (the last one is learned), conversations with tool calls.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.data.prompts import Message, Prompts, chat_messages, check_columns, fitting, read_prompts, render
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe import DataConfig, SFTSettings

Row = dict[str, Any]


@dataclass(frozen=True)
class Supervised:
    """An example for SFT: tokens that are only read, of which there is always one, and tokens that are learned."""

    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, and by how much the scores should differ at least."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float


def build_supervised(
    rows: Iterable[Row], data: DataConfig, settings: SFTSettings, tokenizer: Any, stop_ids: frozenset[int]
) -> list[Supervised]:
    """Turn rows into examples for SFT.

    With `data.text` all of a text is learned but its first token (the BOS, where the tokenizer puts one). Otherwise a
    prompt is that of `build_examples`, and what is learned is `data.completion` (a text, or a list of one assistant
    message) or the last message of `data.messages`. A chat's completion is the assistant's turn as the chat template
    writes it. A plain one begins with a newline unless there is whitespace already, in the text or at the prompt's end:
    the newline is learned, and the prompts are those of rollouts. Every completion ends with one stop token.

    Args:
        settings: with ``completion_only_loss`` false all of an example is learned but its first token.
        stop_ids: the tokens that end a completion when the model samples.

    Returns:
        One example a row. With `data.long_prompts: drop`, those above ``settings.max_length`` tokens are left out and
        their number is logged as a warning.

    Raises:
        UserError: those of `read_prompts`, a row (by number, from 1) without a usable completion, a chat template that
            writes a prompt differently once it is answered, an example that is too long, or none left after dropping.
    """
    rows = list(rows)
    if data.text is not None:
        texts = _texts(rows, data, data.text)
        ids = tokenizer(texts)["input_ids"] if texts else []
        made = [Supervised(one[:1], _ended(one[1:], tokenizer, stop_ids)) for one in ids]
    else:
        prompts = read_prompts(rows, data, tokenizer)
        column = data.messages or data.completion
        assert column is not None  # the recipe has seen to it
        answers = _answers(rows, column, conversations=data.messages is not None)
        completions = _completions(prompts, answers, tokenizer, stop_ids)
        made = [Supervised(*both) for both in zip(prompts.ids, completions, strict=True)]
        if not settings.completion_only_loss:
            made = [Supervised(one.prompt_ids[:1], one.prompt_ids[1:] + one.completion_ids) for one in made]
    _check_prompts(one.prompt_ids for one in made)
    lengths = [len(one.prompt_ids) + len(one.completion_ids) for one in made]
    return [made[index] for index in fitting(lengths, data, settings.max_length, "sft.max_length", "example")]


def build_pairs(
    rows: Iterable[Row],
    data: DataConfig,
    max_length: int,
    tokenizer: Any,
    stop_ids: frozenset[int],
    length_key: str = "reward_model.max_length",
) -> list[Pair]:
    """Turn rows into preference pairs; prompts and answers are made as in `build_supervised`.

    Args:
        max_length: the most tokens that a prompt with the longer of its answers may have.
        stop_ids: the tokens that end a completion when the model samples.
        length_key: the recipe key of ``max_length``, for messages.

    Returns:
        One pair a row, less those that `data.long_prompts: drop` leaves out. The margin is 0 without `data.margin`.

    Raises:
        UserError: those of `build_supervised`, two answers that are the same, or a margin that is no finite number.
    """
    rows = list(rows)
    prompts = read_prompts(rows, data, tokenizer)
    _check_prompts(prompts.ids)
    assert data.chosen is not None and data.rejected is not None  # the recipe has seen to it
    chosen = _completions(prompts, _answers(rows, data.chosen), tokenizer, stop_ids)
    rejected = _completions(prompts, _answers(rows, data.rejected), tokenizer, stop_ids)
    margins = [_margin(row, number, data) for number, row in enumerate(rows, start=1)]
    pairs = [Pair(*fields) for fields in zip(prompts.ids, chosen, rejected, margins, strict=True)]
    for number, pair in enumerate(pairs, start=1):
        if pair.chosen_ids == pair.rejected_ids:
            raise UserError(
                f"row {number}: columns {data.chosen!r} and {data.rejected!r} hold the same answer, which teaches "
                "nothing; remove the row"
            )
    lengths = [len(one.prompt_ids) + max(len(one.chosen_ids), len(one.rejected_ids)) for one in pairs]
    return [pairs[index] for index in fitting(lengths, data, max_length, length_key, "pair")]


def labelled_texts(rows: Iterable[Row], data: DataConfig) -> tuple[list[str], list[str]]:
    """Return the texts of `data.text` and the class of each, from `data.label`; a whole number becomes its digits.

    Raises:
        UserError: a missing column, an empty text, or a class that is neither a text nor a whole number (the row by
            number, from 1).
    """
    rows = list(rows)
    assert data.text is not None and data.label is not None  # the recipe has seen to it
    texts, labels = _texts(rows, data, data.text), []
    for number, row in enumerate(rows, start=1):
        label = row[data.label]
        if not isinstance(label, str | int) or not str(label).strip():
            raise UserError(
                f"row {number}: column {data.label!r} must hold a class, a text or a whole number; got {label!r}"
            )
        labels.append(str(label))
    return texts, labels


def _texts(rows: Sequence[Row], data: DataConfig, column: str) -> list[str]:
    for number, row in enumerate(rows, start=1):
        check_columns(row, data, f"row {number} of {data.train}")
    return [_filled(row[column], number, column) for number, row in enumerate(rows, start=1)]


def _check_prompts(ids: Iterable[list[int]]) -> None:
    for number, one in enumerate(ids, start=1):
        if not one:
            raise UserError(
                f"row {number}: what comes before the answer has no tokens; write a prompt, or set data.system"
            )


def _filled(value: Any, number: int, column: str) -> str:
    """Return the text of a column that something is learned from."""
    if isinstance(value, list | dict):
        raise UserError(f"row {number}: column {column!r} must hold a text; got {type(value).__name__}")
    if value is None or not str(value).strip():
        raise UserError(f"row {number}: column {column!r} is empty, and it is learned from; remove the row or fill it")
    return str(value)


def _margin(row: Row, number: int, data: DataConfig) -> float:
    if data.margin is None:
        return 0.0
    value = row[data.margin]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"row {number}: column {data.margin!r} must hold a finite number; got {value!r}")
    return float(value)


def _answers(rows: Sequence[Row], column: str, conversations: bool = False) -> list[Message]:
    """Return the assistant's message of each row: the last of a conversation, or the only one that there is."""
    answers = []
    for number, row in enumerate(rows, start=1):
        value = row[column]
        if not isinstance(value, list):
            answers.append({"role": "assistant", "content": _filled(value, number, column)})
            continue
        messages = chat_messages(value, number, column)
        roles = [str(one["role"]) for one in messages]
        if not conversations and roles != ["assistant"]:
            raise UserError(
                f"row {number}: column {column!r} must hold a text or a list of one assistant message; got messages of "
                f"{', '.join(roles)} (those that are answered belong to data.prompt)"
            )
        _filled(messages[-1]["content"], number, column)
        answers.append(messages[-1])
    return answers


def _completions(
    prompts: Prompts, answers: Sequence[Message], tokenizer: Any, stop_ids: frozenset[int]
) -> list[list[int]]:
    """Return the token ids of the answers as they follow their prompts."""
    texts = []
    for number, (prompt, text, answer) in enumerate(zip(prompts.prompts, prompts.texts, answers, strict=True), start=1):
        if not isinstance(prompt, str):
            texts.append(_turn(prompt, text, answer, number, tokenizer))
        elif text[-1].isspace() or answer["content"][0].isspace():
            texts.append(answer["content"])
        else:
            texts.append("\n" + answer["content"])
    ids = _continuations(texts, tokenizer)
    if prompts.chat:
        ids = [_without_tail(one, tokenizer, stop_ids) for one in ids]
    return [_ended(one, tokenizer, stop_ids) for one in ids]


def _turn(prompt: list[Message], rendered: str, answer: Message, number: int, tokenizer: Any) -> str:
    """Return what the chat template writes after a rendered prompt for the assistant's answer."""
    if prompt[-1]["role"] == "assistant":  # an answer that has been begun
        begun = prompt[-1]
        prompt, answer = prompt[:-1], {**begun, **answer, "content": begun["content"] + answer["content"]}
    whole = render([*prompt, answer], number, tokenizer, whole=True)
    turn = whole.removeprefix(rendered)
    if not whole.startswith(rendered) or not turn.strip():
        raise UserError(
            f"row {number}: the model's chat template does not write the prompt in the same way before and after it is "
            "answered, so that what is learned cannot be told from it; set data.chat=false, or take another model"
        )
    return turn


def _continuations(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of texts that follow another, without the space that some tokenizers put before a text."""
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not tokenizer.tokenize("=")[0].startswith("▁"):
        return ids
    # SentencePiece as in Llama 2: behind a newline, which merges with nothing, a text has no such space.
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    behind = tokenizer(["\n" + text for text in texts], add_special_tokens=False)["input_ids"]
    return [
        after[len(newline) :] if after[: len(newline)] == newline else alone
        for alone, after in zip(ids, behind, strict=True)
    ]


def _without_tail(ids: list[int], tokenizer: Any, stop_ids: frozenset[int]) -> list[int]:
    """Cut a turn after its first stop token, or else its last special one, where only whitespace and others follow."""
    special = stop_ids.union(tokenizer.all_special_ids)
    start = len(ids)
    while start and (ids[start - 1] in special or not tokenizer.decode(ids[start - 1 : start]).strip()):
        start -= 1
    ends = [index + 1 for index in range(start, len(ids)) if ids[index] in special]
    stops = [end for end in ends if ids[end - 1] in stop_ids]
    return ids[: stops[0] if stops else ends[-1]] if ends else ids


def _ended(ids: list[int], tokenizer: Any, stop_ids: frozenset[int]) -> list[int]:
    """Return the ids with the token that ends them, which they may have already."""
    if ids and ids[-1] in stop_ids:
        return ids
    end = min(stop_ids, default=None) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "model: its tokenizer names no end-of-sequence token, so that no answer could end; take another model"
        )
    return [*ids, end]
