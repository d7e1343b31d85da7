"""From rows to prompts: chat template or plain text, token ids, and the order in which training sees them."""

import logging
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from typing import Any, Generic, TypeVar

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe import DataConfig
from lowmem_rlhf.suggest import did_you_mean

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Item = TypeVar("Item")
# What a reward function is given under these names is not a column of the row (TRL drops the same ones).
RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")


@dataclass(frozen=True)
class Example:
    """One prompt: what rewards see, what the model reads, and the columns that rewards are given."""

    prompt: str | list[Message]  # chat messages for a chat prompt, otherwise the plain text
    prompt_ids: list[int]
    columns: dict[str, Any]  # the row's other columns, with the reference under `answer` too
    text: str = ""  # the prompt as the model reads it, special tokens written out


@dataclass(frozen=True)
class Prompts:
    """The prompts of all rows, in order: as rewards see them, as the text that the model reads, and its token ids."""

    chat: bool
    prompts: list[str | list[Message]]
    texts: list[str]
    ids: list[list[int]]


def template_fields(template: str) -> list[str]:
    """Return the columns that a template names, in order and once each.

    Raises:
        UserError: the template has an unbalanced brace, or a place-holder that is more than a column's name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"data.template: {template!r} is not a template ({error}); write {{column}}, and {{{{ or }}}} for a brace"
        ) from error
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion):
            raise UserError(
                f"data.template: {template!r} has a place-holder that is not just a column's name; write {{column}}, "
                "and {{ or }} for a brace"
            )
    return list(dict.fromkeys(name for _, name, _, _ in parts if name))


def used_columns(data: DataConfig) -> list[str]:
    """Return the columns that a prompt is made of: the conversation's, the plain text's, the template's or its own."""
    return [name for _, name in _prompt_columns(data)]


def _prompt_columns(data: DataConfig) -> list[tuple[str, str]]:
    """Return (recipe key, column) of each column that a prompt is made of."""
    if data.messages is not None:
        return [("data.messages", data.messages)]
    if data.text is not None:
        return [("data.text", data.text)]
    if data.template is not None:
        return [("data.template", name) for name in template_fields(data.template)]
    return [("data.prompt", data.prompt)]


def check_columns(names: Collection[str], data: DataConfig, source: str = "") -> None:
    """Check that all columns that the recipe names are there: the prompt's, and those of answers and classes.

    Raises:
        UserError: one is missing; the message names those there are.
    """
    wanted = _prompt_columns(data)
    # The completion comes before the answer: it may be the same column, and is then the one that matters.
    for key in ("completion", "chosen", "rejected", "margin", "label", "answer"):
        if (column := getattr(data, key)) is not None:
            wanted.append((f"data.{key}", column))
    for key, name in wanted:
        if name not in names:
            remedy = "; set data.answer=null if there is no reference answer" if key == "data.answer" else ""
            raise UserError(
                f"{key}: {source or data.train} has no column {name!r}{did_you_mean(name, names)} "
                f"(its columns: {', '.join(names)}){remedy}"
            )


def build_examples(rows: Iterable[dict[str, Any]], data: DataConfig, tokenizer: Any) -> list[Example]:
    """Turn rows into prompts.

    They are those of `read_prompts`.

    Returns:
        One example a row. With `data.long_prompts: drop`, prompts above `data.max_prompt_length` tokens are left out
        and their number, ``len(rows) - len(examples)``, is logged as a warning.

    Raises:
        UserError: no chat template for a chat, a missing column, a row without a usable prompt (by number, from 1), a
            prompt that is too long, or no prompt left after dropping.
    """
    rows = list(rows)
    made = read_prompts(rows, data, tokenizer)
    kept = fitting([len(one) for one in made.ids], data, data.max_prompt_length, "data.max_prompt_length", "prompt")
    return [
        Example(made.prompts[index], made.ids[index], _columns(rows[index], data), made.texts[index]) for index in kept
    ]


def read_prompts(rows: Sequence[dict[str, Any]], data: DataConfig, tokenizer: Any) -> Prompts:
    """Return the prompts of rows, of any length.

    A prompt is a chat when `data.chat` is true, or auto and the tokenizer has a chat template; a prompt column that
    holds messages is used as it is, with the system message put first when it has none. The prompt of a conversation
    (`data.messages`) is all that comes before its last message, the assistant's. A plain prompt is the system text, an
    empty line and the text, tokenized as the tokenizer does by default (with its BOS if it has one).

    Raises:
        UserError: no chat template for a chat, a missing column, a row without a usable prompt (by number, from 1), or
            `data.text`, which has no prompts.
    """
    chat = _is_chat(data, tokenizer)
    prompts: list[str | list[Message]] = []
    for number, row in enumerate(rows, start=1):
        check_columns(row, data, f"row {number} of {data.train}")
        prompts.append(_chat(row, number, data) if chat else _plain(row, number, data))
    texts = [
        prompt if isinstance(prompt, str) else render(prompt, number, tokenizer)
        for number, prompt in enumerate(prompts, start=1)
    ]
    # A chat template has already written the special tokens, BOS included.
    ids = tokenizer(texts, add_special_tokens=not chat)["input_ids"] if texts else []
    return Prompts(chat, prompts, texts, ids)


def _is_chat(data: DataConfig, tokenizer: Any) -> bool:
    if data.text is not None:
        raise UserError(
            "data.text: whole texts have no prompt that could be completed; name data.prompt and data.completion in "
            "place of data.text, or remove the rewards that would judge completions"
        )
    if data.messages is not None and not (data.chat and tokenizer.chat_template):
        remedy = (
            "data.chat is false; leave it out"
            if tokenizer.chat_template
            else "the model's tokenizer has none; take an instruction-tuned model, or write them out for data.text"
        )
        raise UserError(f"data.messages: conversations are written by a chat template, and {remedy}")
    if data.chat is True and not tokenizer.chat_template:
        raise UserError(
            "data.chat: got true, but the model's tokenizer has no chat template; set data.chat=false for plain "
            "prompts, or take an instruction-tuned model"
        )
    return bool(tokenizer.chat_template) if data.chat == "auto" else data.chat


def _columns(row: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    # A column that a template quotes is not the prompt itself: rewards may want it.
    left_out = RESERVED if data.template is not None else (*RESERVED, *used_columns(data))
    columns = {name: value for name, value in row.items() if name not in left_out}
    return columns if data.answer is None else {**columns, "answer": row[data.answer]}


def _text(row: dict[str, Any], number: int, data: DataConfig) -> str:
    for name in used_columns(data):
        value = row[name]
        if isinstance(value, list | dict):
            raise UserError(
                f"row {number}: column {name!r} holds chat messages or another structure, and a text is needed here; "
                "leave data.template out and use the model's chat template, or name a column of text"
            )
        if value is None or not str(value).strip():
            raise UserError(
                f"row {number}: column {name!r} is empty, and a prompt is made of it; remove the row or fill it"
            )
    if data.template is None:
        text = str(row[data.prompt])
        return text if data.prompt_words is None else " ".join(text.split()[: data.prompt_words])
    parts = Formatter().parse(data.template)
    return "".join(text + (str(row[name]) if name else "") for text, name, _, _ in parts)


def _plain(row: dict[str, Any], number: int, data: DataConfig) -> str:
    text = _text(row, number, data)
    return f"{data.system}\n\n{text}" if data.system else text


def _chat(row: dict[str, Any], number: int, data: DataConfig) -> list[Message]:
    if data.messages is not None:
        messages = _before_answer(row[data.messages], number, data.messages)
    elif data.template is None and isinstance(row[data.prompt], list):
        messages = chat_messages(row[data.prompt], number, data.prompt)
    else:
        messages = [{"role": "user", "content": _text(row, number, data)}]
    if data.system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": data.system})
    if not messages:
        raise UserError(
            f"row {number}: column {data.messages!r} holds nothing but the assistant's answer; put what it answers "
            "before it, or set data.system"
        )
    return messages


def _before_answer(value: Any, number: int, column: str) -> list[Message]:
    """Return the messages before the last one, which must be the assistant's."""
    messages = chat_messages(value, number, column)
    roles = [one["role"] for one in messages[-2:]]
    if roles[-1] != "assistant":
        raise UserError(
            f"row {number}: the last message of column {column!r} must be the assistant's, which is learned; got a "
            f"message of {roles[-1]}"
        )
    if roles == ["assistant", "assistant"]:
        raise UserError(f"row {number}: column {column!r} ends in two messages of the assistant; join them into one")
    return messages[:-1]


def chat_messages(value: Any, number: int, column: str) -> list[Message]:
    """Return a column's list of chat messages without the keys that are None.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, list):
        raise UserError(
            f"row {number}: column {column!r} must hold a list of chat messages; got {type(value).__name__}"
        )
    well_formed = all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value)
    if not value or not well_formed or not all(isinstance(one["content"], str) for one in value):
        raise UserError(
            f"row {number}: column {column!r} is a list but not one of chat messages; each must be "
            "{'role': ..., 'content': TEXT}"
        )
    # Arrow fills the keys that only other messages have with None.
    return [{key: part for key, part in one.items() if part is not None} for one in value]


def render(messages: list[Message], number: int, tokenizer: Any, whole: bool = False) -> str:
    """Return the text of messages: a prompt, up to where the assistant goes on, or a whole conversation.

    Raises:
        UserError: the template refuses the messages of row ``number``.
    """
    from jinja2 import TemplateError

    # An answer that has been begun is continued, as TRL does.
    begun = messages[-1]["role"] == "assistant" and not whole
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not (begun or whole), continue_final_message=begun
        )
    except TemplateError as error:
        roles = ", ".join(str(one["role"]) for one in messages)
        reason = " ".join(str(error).split())
        raise UserError(
            f"row {number}: the model's chat template refuses these messages ({roles}): {reason}; for a template "
            "without a system role, leave data.system out or put it into data.template"
        ) from error


def fitting(lengths: list[int], data: DataConfig, limit: int, key: str, noun: str) -> list[int]:
    """Return the rows, counted from 0, that have at most ``limit`` tokens, as `data.long_prompts` has it.

    Args:
        lengths: the tokens of each row.
        key: the recipe key of the limit, for messages.
        noun: what a row makes, for messages: prompt, example, pair.

    Raises:
        UserError: one is longer, or all are where such rows are dropped.
    """
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    dropped = len(lengths) - len(kept)
    if not dropped:
        return kept
    if data.long_prompts == "error":
        first = next(index for index, length in enumerate(lengths) if length > limit)
        raise UserError(
            f"row {first + 1}: its {noun} has {lengths[first]} tokens, {key} is {limit} ({dropped} of {len(lengths)} "
            f"{noun}s are above it, the longest has {max(lengths)}); raise {key} to {max(lengths)}, or set "
            "data.long_prompts=drop"
        )
    if not kept:
        raise UserError(
            f"data.long_prompts: all {dropped} {noun}s are above {key} ({limit} tokens; the shortest has "
            f"{min(lengths)}), so none is left; raise {key}"
        )
    logger.warning("%d of %d %ss have more than %d tokens and are left out", dropped, len(lengths), noun, limit)
    return kept


class PromptStream(Generic[Item]):
    """The endless, shuffled order of prompts, or of other examples: each once an epoch, each epoch in another order.

    It has no state: a batch is a function of (seed, step), so a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, examples: Sequence[Item], prompts_per_step: int, seed: int) -> None:
        """Keep the examples; with fewer than ``prompts_per_step`` of them a batch repeats some.

        Raises:
            UserError: there are no examples.
        """
        if not examples:
            raise UserError("data.train: there is no prompt to train on")
        self.examples = examples
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.examples)))
        random.Random(f"prompts/{self.seed}/{epoch}").shuffle(order)
        return order

    def batch(self, step: int) -> list[Item]:
        """Return the ``prompts_per_step`` examples of a step, counted from 0."""
        first = step * self.prompts_per_step
        places = (divmod(first + offset, len(self.examples)) for offset in range(self.prompts_per_step))
        return [self.examples[self._order(epoch)[index]] for epoch, index in places]
