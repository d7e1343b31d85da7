"""From rows to prompts: chat template or plain text, and token ids."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError, RowReport
from lowmem_rlhf.data.chat_template import ChatTemplate, is_chat
from lowmem_rlhf.data.messages import Message, chat_messages
from lowmem_rlhf.data.row_template import fill_template, required_fields, template_fields
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.data.values import Row, has_column, is_missing, text_of, value_at
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe import DataConfig
from lowmem_rlhf.suggest import did_you_mean

__all__ = ["Example", "Message", "PromptStream", "build_examples", "check_columns", "template_fields", "used_columns"]

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
class Prompt:
    """A row's prompt before it is tokenized.

    Attributes:
        row: its row.
        prompt: chat messages, or the plain text.
        text: what the model reads.
        tools: the tools that the row describes to the chat template.
    """

    row: Row
    prompt: str | list[Message]
    text: str
    tools: Any = None


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
    if data.prompt is None:  # the beginning that both answers of a pair share
        return [("data.chosen", str(data.chosen))]
    return [("data.prompt", data.prompt)]


def check_columns(names: Collection[str] | Mapping[str, Any], data: DataConfig, source: str = "") -> None:
    """Check that all columns that the recipe names are there: the prompt's, and those of answers and classes.

    Args:
        names: the columns of a source, or one row of it.
        source: what has them, for messages.

    Raises:
        UserError: one is missing; the message names those there are.
    """
    wanted = _prompt_columns(data)
    optional = set(template_fields(data.template)) - set(required_fields(data.template)) if data.template else set()
    # The completion comes before the answer: it may be the same column, and is then the one that matters.
    for key in ("completion", "chosen", "rejected", "margin", "label", "answer"):
        if (column := getattr(data, key)) is not None:
            wanted.append((f"data.{key}", column))
    for key, name in wanted:
        # Of a nested column the names alone say only whether its first part is there.
        if name in names or name.split(".")[0] in names or (isinstance(names, Mapping) and name in optional):
            continue
        remedy = "; set data.answer=null if there is no reference answer" if key == "data.answer" else ""
        raise UserError(
            f"{key}: {source or data.train} has no column {name!r}{did_you_mean(name, names)} "
            f"(its columns: {', '.join(names)}){remedy}"
        )


def build_examples(
    rows: Iterable[Mapping[str, Any]],
    data: DataConfig,
    tokenizer: Any,
    stop_ids: frozenset[int] = frozenset(),
    report: RowReport | None = None,
) -> list[Example]:
    """Turn rows into prompts.

    A prompt is a chat when `data.chat` is true, or auto and the tokenizer has a chat template; a prompt column that
    holds messages is used as it is, with the system message put first when it has none. The prompt of a conversation
    (`data.messages`) is all that comes before its last message, the assistant's. A plain prompt is the system text, an
    empty line and the text, tokenized as the tokenizer does by default (with its BOS if it has one), and without what
    the tokenizer puts behind it.

    Args:
        stop_ids: tokens that end a completion; a prompt must not end in one.
        report: collects what is wrong with rows and what is said of them; absent: one of this call's own.

    Returns:
        One example a row. Rows that cannot be used are left out with `data.bad_rows: drop`, those above
        `data.max_prompt_length` tokens with `data.long_prompts: drop` too; how many is logged as a warning.

    Raises:
        UserError: no chat template for a chat, a row without a usable prompt (by number), a prompt that is too long, or
            no prompt left after dropping.
    """
    report = report or RowReport(data)
    writer = PromptWriter(data, tokenizer, stop_ids, report)
    prompts: list[Prompt] = []
    given = report.each(rows)
    _check_answer_part(given, data)
    names = dict.fromkeys(name for row in given for name in row)
    for row in given:
        with report.row(row.number):
            prompts.append(writer.prompt(row))
    kept = []
    for made, ids in zip(prompts, writer.prompt_ids(prompts), strict=True):
        number = made.row.number
        with report.row(number):
            writer.check_end(ids)
            if not report.fits(number, len(ids), data.max_prompt_length, "data.max_prompt_length", "prompt"):
                continue
            kept.append(Example(made.prompt, ids, _columns(made.row, data, names), made.text))
            if not isinstance(made.prompt, str) and made.prompt[-1]["role"] == "assistant":
                report.note(_CONTINUED, number)
    report.finish(len(kept))
    return kept


_CONTINUED = (
    "the prompt ends in an assistant's message, which is taken as a begun answer and continued; where it is a finished "
    "one, end the prompt with the user's message"
)


class PromptWriter:
    """Writes the prompts of rows, as rewards see them and as the model reads them.

    Attributes:
        template: the chat template; None: prompts are plain texts.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, stop_ids: frozenset[int], report: RowReport) -> None:
        """Raises UserError where the recipe asks for a chat that the tokenizer has no template for."""
        if data.text is not None:
            raise UserError(
                "data.text: whole texts have no prompt that could be completed; name data.prompt and data.completion "
                "in place of data.text, or remove the rewards that would judge completions"
            )
        self.data, self.tokenizer, self.report = data, tokenizer, report
        self.template = ChatTemplate(tokenizer, data.chat_template_kwargs) if is_chat(data, tokenizer) else None
        end = tokenizer.eos_token_id
        self.stop_ids = stop_ids | ({end} if end is not None else set())
        self._special = tuple(str(token) for token in tokenizer.all_special_tokens)
        if self.template is not None:
            if data.system == "":
                self._check_empty_system("data.system: got an empty text")
            self._check_recipe_texts()

    def prompt(self, row: Row, value: Any = None) -> Prompt:
        """Return a row's prompt; ``value`` stands in place of its column.

        Raises:
            RowError: the row has no usable one.
        """
        if self.template is None:
            text = value if isinstance(value, str) else self._text(row)
            text = f"{self.data.system}\n\n{text}" if self.data.system else text
            return Prompt(row, text, text)
        messages = self._chat(row, value)
        tools = _tools(row)
        text = self.template.prompt(messages, tools, lambda said: self.report.note(said, row.number))
        return Prompt(row, messages, text, tools)

    def messages(self, value: Any, column: str, number: int) -> list[Message]:
        """Return a column's conversation (see `chat_messages`), without special tokens that would end a turn in it.

        Raises:
            RowError: it is none.
        """
        assert self.template is not None
        found = chat_messages(value, column, self.template.names_role, lambda text: self.report.note(text, number))
        for message in found:
            check_characters(message["content"], column)
            self.check_text(message["content"], column, number)
            if message["role"] == "system" and not message["content"].strip():
                self._check_empty_system(f"column {column!r} has an empty system message")
        return found

    def conversation(self, row: Row) -> list[Message]:
        """Return the conversation of `data.messages`, which ends in the assistant's message.

        Raises:
            RowError: it does not, or it begins with the assistant's.
        """
        column = str(self.data.messages)
        messages = self.messages(cell(row, column, "data.messages"), column, row.number)
        roles = [one["role"] for one in messages]
        if roles[-1] != "assistant":
            raise RowError(
                "a conversation that does not end with the assistant",
                f"the last message of column {column!r} must be the assistant's, which is learned; got a message of "
                f"{roles[-1]}",
            )
        if roles[-2:] == ["assistant", "assistant"]:
            raise RowError(
                "two answers at the end", f"column {column!r} ends in two messages of the assistant; join them into one"
            )
        if len(roles) > 1 and next(role for role in roles if role != "system") == "assistant" and "user" in roles:
            raise RowError(
                "a conversation that begins with the assistant",
                f"column {column!r} begins with the assistant's message; begin it with the user's",
            )
        if messages[-1].get("weight") == 0:
            raise RowError(
                "an answer of weight 0",
                f"the last answer of column {column!r} has weight 0, so it is not to be learned",
            )
        content = messages[-1]["content"]
        if not content.strip() and not messages[-1].get("tool_calls"):
            raise RowError(
                "an empty column", f"column {column!r} is empty, and it is learned from; remove the row or fill it"
            )
        return messages

    def check_text(self, text: str, column: str, number: int) -> None:
        """Look for special tokens that are written out in a text of a chat.

        Raises:
            RowError: one of them is a mark of turns.
        """
        if self.template is None:
            return
        control = self.template.control_tokens
        if written := self._mark_in(text):
            raise RowError(
                "a special token written out",
                f"column {column!r} holds {written} written out, which the model reads as its special token, a mark "
                "between messages; remove it, or set data.chat=false",
            )
        for token in self._special:
            if token not in control and token in text:
                self.report.note(f"{token} is written out, and read as the special token that it is", number)

    def _mark_in(self, text: str) -> str:
        """Return the first mark between messages that a text holds; empty: none."""
        assert self.template is not None
        return min((one for one in self.template.control_tokens if one in text), key=text.index, default="")

    def _check_recipe_texts(self) -> None:
        for key in ("system", "template"):
            if mark := self._mark_in(getattr(self.data, key) or ""):
                raise UserError(
                    f"data.{key}: holds {mark}, a mark between messages that the model's chat template writes itself; "
                    "remove it, or set data.chat=false to write prompts without the template"
                )

    def _check_empty_system(self, what: str) -> None:
        assert self.template is not None
        if own := self.template.replaces_empty_system():
            raise RowError(
                "an empty system text",
                f"{what}, but the model's chat template then writes a system text of its own ({own.strip()[:100]!r}); "
                "give a text, or leave it out",
            )

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of prompts."""
        texts = [one.text for one in prompts]
        if not texts:
            return []
        bare = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        if self.template is not None:  # a chat template has already written the special tokens, BOS included
            return list(bare)
        with_special = self.tokenizer(texts)["input_ids"]
        return [self._begun(ids, own) for ids, own in zip(with_special, bare, strict=True)]

    def _begun(self, ids: list[int], own: list[int]) -> list[int]:
        """Return ids without what the tokenizer put behind the text."""
        special = {*self.tokenizer.all_special_ids, *self.stop_ids}
        while ids and ids[-1] in special and ids[-1:] != own[-1:]:
            ids = ids[:-1]
        return ids

    def check_end(self, ids: Sequence[int]) -> None:
        """Check what the model reads of a prompt.

        Raises:
            RowError: nothing, or it ends in a token that ends a completion.
        """
        if not ids:
            raise RowError(
                "a prompt without tokens",
                "what comes before the answer has no tokens; write a prompt, or set data.system",
            )
        if ids[-1] in self.stop_ids:
            token = self.tokenizer.convert_ids_to_tokens(int(ids[-1]))
            raise RowError(
                "a prompt that ends in a stop",
                f"its prompt ends in {token}, which ends a text, so that nothing would follow; remove it from the row "
                "or from data.template"
                + (", or take a model whose chat template begins the assistant's turn" if self.template else ""),
            )

    def _text(self, row: Row) -> str:
        data = self.data
        names = used_columns(data)
        needed = required_fields(data.template) if data.template is not None else names
        texts = {}
        for name in names:
            value = cell(row, name, "data.template" if data.template is not None else "data.prompt", name in needed)
            if isinstance(value, list | dict):
                raise RowError(
                    "a structure where a text is needed",
                    f"column {name!r} holds chat messages or another structure, and a text is needed here; leave "
                    "data.template out and use the model's chat template, or name a column of text (a.b: the part b of "
                    "column a)",
                )
            texts[name] = "" if is_missing(value) else text_of(value)
            check_characters(texts[name], name)
            if name in needed and not texts[name].strip():
                hint = f", or write {{{name}?}} in data.template where it may be empty" if data.template else ""
                raise RowError(
                    "an empty column",
                    f"column {name!r} is empty, and a prompt is made of it; remove the row or fill it{hint}",
                )
            self.check_text(texts[name], name, row.number)
        if data.template is None:
            text = texts[names[0]]
            return text if data.prompt_words is None else " ".join(text.split()[: data.prompt_words])
        text = fill_template(data.template, texts)
        if not text.strip():
            raise RowError("an empty column", "all columns of data.template are empty; remove the row or fill one")
        return text

    def _chat(self, row: Row, value: Any) -> list[Message]:
        data = self.data
        if value is None and data.messages is not None:
            value = self.conversation(row)[:-1]
        elif value is None and data.template is None and data.prompt is not None:
            there = value_at(row, data.prompt)
            value = self.messages(there, data.prompt, row.number) if isinstance(there, list) else None
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        messages = list(value) if value is not None else [{"role": "user", "content": self._text(row)}]
        for message in messages:
            check_characters(message["content"], data.prompt or data.messages or str(data.chosen))
        if data.system is not None and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": data.system})
        if not messages:
            raise RowError(
                "no prompt",
                f"column {data.messages!r} holds nothing but the assistant's answer; put what it answers before it, or "
                "set data.system",
            )
        return messages


def _check_answer_part(rows: Sequence[Row], data: DataConfig) -> None:
    """Check that some row has the nested column of reference answers.

    Raises:
        UserError: none has it.
    """
    if data.answer is None or "." not in data.answer or any(has_column(row, data.answer) for row in rows) or not rows:
        return
    parts = _parts(rows[0])
    raise UserError(
        f"data.answer: no row of {data.train} has {data.answer!r}{did_you_mean(data.answer, parts)} (row "
        f"{rows[0].number} has {', '.join(parts)}); set data.answer=null if there is no reference answer"
    )


def _parts(value: Mapping[str, Any], before: str = "") -> list[str]:
    """Return the columns of a row and the parts of nested ones, as dotted names."""
    names = []
    for name, part in value.items():
        inner = part if isinstance(part, Mapping) else dict(enumerate(part)) if isinstance(part, list) else {}
        names += [f"{before}{name}", *_parts({str(k): v for k, v in list(inner.items())[:5]}, f"{before}{name}.")]
    return names


def cell(row: Row, column: str, key: str, needed: bool = True) -> Any:
    """Return what a row has in a column.

    Raises:
        RowError: it lacks the column, where it is needed.
    """
    if needed and not has_column(row, column):
        raise RowError(
            "a missing column",
            f"it has no column {column!r} ({key}){did_you_mean(column, row)} (its columns: {', '.join(row)})",
        )
    return value_at(row, column)


def check_characters(text: str, column: str) -> None:
    """Check that a text is one of whole characters, which tokenizers need.

    Raises:
        RowError: it holds half of a surrogate pair.
    """
    if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in text):
        raise RowError("half a character", f"column {column!r} holds half of a surrogate pair, which is no character")


def _tools(row: Row) -> Any:
    """Return the tools that a row describes, as a list; some sets hold them as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.lstrip().startswith("[{"):
        import json

        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError("malformed tools", f"column 'tools' is not JSON ({error})") from error
    described = isinstance(tools, list) and all(
        isinstance(one, dict) and ("function" in one or "name" in one) for one in tools
    )
    return tools if described and tools else None


def _columns(row: Row, data: DataConfig, names: Iterable[str]) -> dict[str, Any]:
    """Return what rewards are given of a row: every column that any row has, None where this one lacks it."""
    # A column that a template quotes is not the prompt itself: rewards may want it.
    left_out = RESERVED if data.template is not None else (*RESERVED, *used_columns(data))
    columns = {name: row.get(name) for name in names if name not in left_out}
    return columns if data.answer is None else {**columns, "answer": value_at(row, data.answer)}
