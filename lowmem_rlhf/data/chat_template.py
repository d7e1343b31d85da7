"""A tokenizer's chat template as recipes use it, and what it makes of messages compared with what was given. No torch.

A template is a program of the model's makers: it may leave out reasoning, trim, write a system text of its own, or
forget a role. What a reader of the file would not expect is refused for that row, mended, or said.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.messages import Message
from lowmem_rlhf.data.rendered import THINK, check_calls, holds, must_be_written, short, squeezed, unopened
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe import DataConfig
from lowmem_rlhf.suggest import did_you_mean

_SENTINEL = "Zq7x"  # a text that no template knows, for finding where an answer stands


def is_chat(data: DataConfig, tokenizer: Any) -> bool:
    """Return whether prompts are chats: `data.chat`, or for auto whether the tokenizer has a chat template.

    Raises:
        UserError: a chat is asked for and there is no template, or conversations are to be plain text.
    """
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
    return bool(tokenizer.chat_template) if data.chat == "auto" else bool(data.chat)


@dataclass(frozen=True)
class Turn:
    """What a template writes behind a prompt for an answer.

    Attributes:
        text: from the prompt's end to the end of the conversation.
        notes: what differs from the answer and is worth saying.
    """

    text: str
    notes: tuple[str, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer, with the recipe's keyword arguments.

    Args:
        tokenizer: has a chat template.
        options: given to the template with every call (`data.chat_template_kwargs`).
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]) -> None:
        self._tokenizer, self._options = tokenizer, options
        templates = tokenizer.chat_template
        self.source = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)

    def names_role(self, role: str) -> bool:
        """Return whether the template's source names a role."""
        return bool(role.strip()) and re.search(rf"""["']{re.escape(role)}["']""", self.source) is not None

    def unread_options(self) -> list[str]:
        """Return, as clauses, the keyword arguments that the template's source does not name: they have no effect."""
        words = dict.fromkeys(re.findall(r"\w+", self.source))
        return [f"{key!r}{did_you_mean(key, words)}" for key in self._options if key not in words]

    def prompt(
        self, messages: Sequence[Message], tools: Any = None, note: Callable[[str], None] = lambda text: None
    ) -> str:
        """Return the text of a prompt, up to where the assistant goes on; an answer that has been begun is continued.

        Args:
            note: called with what differs from the messages and is worth saying.

        Raises:
            RowError: the template refuses the messages, or leaves out or rewrites a part of them.
        """
        if messages[-1]["role"] != "assistant":
            text = self._render(messages, tools, add_generation_prompt=True)
        else:
            text = self._continued(messages, tools)
        self._compare(messages, text, note)
        return text

    def turn(self, prompt: Sequence[Message], rendered: str, answer: Message, tools: Any = None) -> Turn:
        """Return what the template writes after a rendered prompt for the assistant's answer.

        An answer that the template would cut or rewrite (its reasoning, most often) is written as it was given, and
        the turn ended as the template ends one.

        Raises:
            RowError: the template refuses the messages or does not write the prompt in the same way once it is
                answered.
        """
        notes: list[str] = []
        rest = str(answer["content"])
        if prompt[-1]["role"] == "assistant":  # an answer that has been begun
            begun = prompt[-1]
            prompt, answer = prompt[:-1], {**begun, **answer, "content": begun["content"] + answer["content"]}
        whole = self._render([*prompt, answer], tools)
        turn = whole.removeprefix(rendered) if whole.startswith(rendered) else ""
        if turn.strip() and holds(turn, answer, unopened(rendered, rest), notes):
            return Turn(turn, tuple(notes))
        mended = None if answer.get("tool_calls") else self._as_given(prompt, rendered, rest, tools)
        if mended is None:
            if turn.strip():
                raise RowError(
                    "an answer that the chat template rewrites",
                    "the model's chat template leaves out or rewrites a part of the answer "
                    f"{short(answer['content'])}; set data.chat=false, or take another model",
                )
            without = "data.chat_template_kwargs={enable_thinking: false}, or " if self._may_think() else ""
            raise RowError(
                "a prompt that the chat template writes in two ways",
                "the model's chat template does not write the prompt in the same way before and after it is answered, "
                f"so that what is learned cannot be told from it; set {without}data.chat=false, or take another model",
            )
        note = "the chat template would leave out or rewrite a part of the answer, which is learned as it was given"
        return Turn(mended, (note,))

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The special tokens with which the template marks turns; in a text they would be read as such a mark."""
        special = [str(token) for token in self._tokenizer.get_added_vocab()]
        special += [str(token) for token in self._tokenizer.all_special_tokens]
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        system = {"role": "system", "content": "c"}
        for probe in ([system, asked, answered, asked], [asked, answered, asked], [asked]):
            try:
                text = self._render(probe, None, add_generation_prompt=True) + self._render([*probe, answered], None)
            except RowError:
                continue
            return frozenset(token for token in special if token in text and token not in THINK)
        return frozenset()

    @cached_property
    def own_system_text(self) -> str | None:
        """What the template writes before the first user message where no system message is given; None: unknown."""
        try:
            return self._render([{"role": "user", "content": _SENTINEL}], None).partition(_SENTINEL)[0]
        except RowError:
            return None

    def _render(self, messages: Sequence[Message], tools: Any, **options: Any) -> str:
        given = {"add_generation_prompt": False, **options, **self._options}
        if tools:
            given["tools"] = tools
        try:
            return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **given))
        except Exception as error:  # a template is a program, and may fail as one
            roles = ", ".join(str(one["role"]) for one in messages)
            reason = " ".join(str(error).split()) or type(error).__name__
            hint = (
                "; for a template without a system role, leave data.system out or put it into data.template"
                if any(one["role"] == "system" for one in messages)
                else ""
            )
            raise RowError(
                "messages that the chat template refuses",
                f"the model's chat template refuses these messages ({roles}): {reason[:300]}{hint}",
            ) from error

    def _continued(self, messages: Sequence[Message], tools: Any) -> str:
        """Return a prompt that ends in a begun answer, which must stand at its end as it was given."""
        begun = str(messages[-1]["content"])
        opened = self._render(messages[:-1], tools, add_generation_prompt=True) if len(messages) > 1 else ""
        if not begun.strip() and opened:
            return opened
        text = self._render(messages, tools)
        before, found, _ = text.rpartition(begun.strip()) if begun.strip() else ("", "", "")
        as_given = not opened or before.rstrip() == opened.rstrip() or opened.startswith(before)
        if not found or not as_given:
            raise RowError(
                "a begun answer that the chat template rewrites",
                f"the prompt ends in a begun answer, {short(begun)}, which the model's chat template leaves out or "
                "rewrites; remove it from the prompt, or set data.chat=false",
            )
        return before + begun.lstrip()  # the white space at its end as well, whatever the template does to it

    def _as_given(self, prompt: Sequence[Message], rendered: str, given: str, tools: Any) -> str | None:
        """Return what is behind a rendered prompt for an answer as it was given; None: the template allows none."""
        plain = self._render([*prompt, {"role": "assistant", "content": _SENTINEL}], tools)
        before, found, end = plain.rpartition(_SENTINEL)
        if not found or not given.strip():
            return None
        if not rendered.startswith(before.rstrip()) and not before.startswith(rendered):
            return None
        if rendered.rstrip().endswith(THINK[0]) and THINK[1] not in given:
            return None  # the prompt has opened reasoning that the answer does not close
        return unopened(rendered, given) + end

    def _may_think(self) -> bool:
        return "enable_thinking" in self.source and "enable_thinking" not in self._options

    def replaces_empty_system(self) -> str:
        """Return the text that the template writes in place of an empty system message; empty: none."""
        user, own = {"role": "user", "content": _SENTINEL}, self.own_system_text
        try:
            empty = self._render([{"role": "system", "content": ""}, user], None).partition(_SENTINEL)[0]
            named = self._render([{"role": "system", "content": _SENTINEL}, user], None).partition(_SENTINEL)[0]
        except RowError:
            return ""
        return empty.removeprefix(named) if own == empty and empty.startswith(named) and empty != named else ""

    def _compare(self, messages: Sequence[Message], text: str, note: Callable[[str], None]) -> None:
        """Check that the texts of messages stand in what was rendered, one after another."""
        there, start = squeezed(text), 0
        for message in messages:
            check_calls(message, text)
        for place, message in enumerate(messages, start=1):
            content = squeezed(must_be_written(message))
            if not content:
                continue
            found = there.find(content, start)
            if found < 0:
                raise RowError(
                    "a message that the chat template leaves out",
                    f"the model's chat template leaves out or rewrites message {place} ({message['role']}): "
                    f"{short(str(message['content']))}; put it into another message, or set data.chat=false",
                )
            start = found + len(content)
            if (written := str(message["content"])) not in text:
                kind = "trims" if written.strip() in text else "changes"
                note(f"the chat template {kind} white space of a message of the prompt")
