"""Writing the prompts of rows: as rewards see them, as the model reads them, and their token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.architecture.stops import turn_end, without_end
from lowmem_rlhf.data.bad_rows import RowError, RowReport
from lowmem_rlhf.data.chat_template import ChatTemplate, is_chat
from lowmem_rlhf.data.columns import cell, check_characters, used_columns
from lowmem_rlhf.data.conversations import answered
from lowmem_rlhf.data.few_shot import KEY, Shot, answer_of, before_messages, before_text, column_rows, file_rows
from lowmem_rlhf.data.messages import Message, chat_messages, is_written_out, tools_of
from lowmem_rlhf.data.row_template import fill_template, required_fields
from lowmem_rlhf.data.values import Row, is_missing, text_of, value_at
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig

_BESIDE = ("system", "system_prompt", "history")  # columns that go with a prompt in sets of instructions


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


class PromptWriter:
    """Writes the prompts of rows, as rewards see them and as the model reads them.

    Attributes:
        template: the chat template; None: prompts are plain texts.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Any,
        stop_ids: frozenset[int],
        report: RowReport,
        shots: Sequence[Shot] | None = None,
    ) -> None:
        """Prepare to write.

        Args:
            data: the recipe's section.
            tokenizer: of the model.
            stop_ids: tokens that end a completion.
            report: on the rows.
            shots: solved examples before each prompt; None: those that the recipe's file holds.

        Raises:
            UserError: the recipe asks for a chat that the tokenizer has no template for, or examples cannot be read.
        """
        if data.text is not None:
            raise UserError(
                "data.text: whole texts have no prompt that could be completed; name data.prompt and data.completion "
                "in place of data.text, or remove the rewards that would judge completions"
            )
        self.data, self.tokenizer, self.report = data, tokenizer, report
        self.template = (
            ChatTemplate(tokenizer, data.chat_template_kwargs, data.messages is None)
            if is_chat(data, tokenizer)
            else None
        )
        end = tokenizer.eos_token_id
        self.stop_ids = stop_ids | ({end} if end is not None else set())
        if self.template is not None:
            self.stop_ids |= turn_end(tokenizer, **data.chat_template_kwargs)
        self._used = {name.split(".")[0] for name in used_columns(data)}
        self._special = tuple(str(token) for token in tokenizer.all_special_tokens)
        if self.template is not None:
            if data.system == "":
                self._check_empty_system("data.system: got an empty text")
            self._check_recipe_texts()
            if self.template.renderer.unread_options:
                report.note(self.template.renderer.unread_options, 0)
        self.shots = self._shots_of_file() if shots is None else shots

    def prompt(self, row: Row, value: Any = None) -> Prompt:
        """Return a row's prompt; ``value`` stands in place of its column.

        Raises:
            RowError: the row has no usable one.
        """
        self._note_unread(row)
        if self.template is None:
            text = value if isinstance(value, str) else self._text(row)
            text = before_text(self._shots(row), text)
            text = f"{self.data.system}\n\n{text}" if self.data.system else text
            return Prompt(row, text, text)
        messages = self._chat(row, value)
        self._check_said(messages)
        messages = before_messages(self._shots(row), messages)
        tools = tools_of(row)
        text = self.template.prompt(messages, tools, lambda said: self.report.note(said, row.number))
        return Prompt(row, messages, text, tools)

    def _shots_of_file(self) -> list[Shot]:
        shots: list[Shot] = []
        for row in file_rows(self.data):
            try:
                shots.append(self._shot(row))
            except RowError as error:
                assert self.data.few_shot is not None
                raise UserError(f"{KEY}.file: row {row.number} of {self.data.few_shot.file}: {error}") from error
        return shots

    def _shots(self, row: Row) -> Sequence[Shot]:
        return self.shots or [self._shot(one) for one in column_rows(row, self.data)]

    def _shot(self, row: Row) -> Shot:
        shot = Shot(self._text(row), answer_of(row, self.data))
        self.check_text(shot.answer, "answer", row.number)
        return shot

    def _note_unread(self, row: Row) -> None:
        """Note the columns that other programs read into a prompt and that this recipe does not name."""
        for name in _BESIDE:
            if name in row and not is_missing(row[name]) and row[name] not in ("", []) and name not in self._used:
                self.report.note(
                    f"column {name!r} is not part of the prompt; name it in data.template, or put it into the messages",
                    row.number,
                )

    def _check_said(self, messages: Sequence[Message]) -> None:
        """Check that somebody says something in a prompt.

        Raises:
            RowError: all messages are empty but the system's.
        """
        turns = [one for one in messages if one["role"] != "system"]
        if turns and not any(str(one["content"]).strip() or one.get("tool_calls") for one in turns):
            raise RowError("an empty column", "the messages of its prompt are empty; remove the row or fill them")

    def messages(self, value: Any, column: str, number: int) -> list[Message]:
        """Return a column's conversation (see `chat_messages`), without special tokens that would end a turn in it.

        Raises:
            RowError: it is none.
        """
        assert self.template is not None
        found = chat_messages(
            value, column, self.template.renderer.names_role, lambda text: self.report.note(text, number)
        )
        for message in found:
            check_characters(message["content"], column)
            self.check_text(message["content"], column, number)
            if message["role"] == "system" and not message["content"].strip():
                self._check_empty_system(f"column {column!r} has an empty system message")
        return found

    def conversation(self, row: Row, learn_all: bool = False) -> list[Message]:
        """Return the conversation of `data.messages`, which ends in the assistant's message.

        Args:
            learn_all: each answer is learned; what follows the last one that has not weight 0 is left out.

        Raises:
            RowError: it does not, or it begins with the assistant's.
        """
        column = str(self.data.messages)
        messages = self.messages(cell(row, column, "data.messages"), column, row.number)
        return answered(messages, column, learn_all)

    def check_text(self, text: str, column: str, number: int) -> None:
        """Look for special tokens that are written out in a text of a chat.

        Raises:
            RowError: one of them is a mark of turns.
        """
        if self.template is None:
            return
        control = self.template.renderer.control_tokens
        if written := self._mark_in(text):
            raise RowError(
                "a special token written out",
                f"column {column!r} holds {written} written out, which the model reads as its special token, a mark "
                "between messages; remove it" + (", or set data.chat=false" if self.data.messages is None else ""),
            )
        for token in self._special:
            if token not in control and token in text:
                self.report.note(f"{token} appears in a text and is read as the special token of that name", number)
        if is_written_out(text):
            self.report.note(
                f"column {column!r} holds chat messages written out as a text, and is taken as that text; where they "
                "are meant as messages, write them as a list (in a .jsonl or .parquet file)",
                number,
            )

    def _mark_in(self, text: str) -> str:
        """Return the first mark between messages that a text holds; empty: none."""
        assert self.template is not None
        return min((one for one in self.template.renderer.control_tokens if one in text), key=text.index, default="")

    def _check_recipe_texts(self) -> None:
        for key in ("system", "template"):
            if mark := self._mark_in(getattr(self.data, key) or ""):
                raise UserError(
                    f"data.{key}: holds {mark}, a mark between messages that the model's chat template writes itself; "
                    "remove it, or set data.chat=false to write prompts without the template"
                )

    def _check_empty_system(self, what: str) -> None:
        assert self.template is not None
        if own := self.template.renderer.text_for_empty_system:
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
        ends = {*self.tokenizer.all_special_ids, *self.stop_ids}
        return [without_end(ids, own, ends) for ids, own in zip(with_special, bare, strict=True)]

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
                f"its prompt ends in {token}, which ends a text, so the model would have nothing to continue; "
                "remove it from the row or from data.template"
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
