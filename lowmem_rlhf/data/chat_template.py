"""A tokenizer's chat template as recipes use it, and what it makes of messages compared with what was given. No torch.

A template is a program of the model's makers: it may leave out reasoning, trim, write a system text of its own, or
forget a role. What a reader of the file would not expect is refused for that row, mended, or said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.messages import Message
from lowmem_rlhf.data.rendered import (
    THINK,
    check_calls,
    holds,
    must_be_written,
    short,
    squeezed,
    unopened,
)
from lowmem_rlhf.data.template_renderer import SENTINEL, TemplateRenderer
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig


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
    """Prompts and answers as a chat template writes them, held against the messages that they are made of.

    Args:
        tokenizer: has a chat template.
        options: given to the template with every call (`data.chat_template_kwargs`).
        plain: whether the rows could be written without a template, for messages.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any], plain: bool = True) -> None:
        self.renderer = TemplateRenderer(tokenizer, options)
        self._way_out = "set data.chat=false, or take another model" if plain else "take another model"

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
            text = self.renderer.render(messages, tools, add_generation_prompt=True)
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
        whole = self.renderer.render([*prompt, answer], tools)
        turn = whole.removeprefix(rendered) if whole.startswith(rendered) else ""
        if turn.strip() and holds(turn, answer, unopened(rendered, rest), notes, self.renderer.special_tokens):
            return Turn(turn, tuple(notes))
        mended = None if answer.get("tool_calls") else self._as_given(prompt, rendered, rest, tools)
        if mended is None:
            if turn.strip():
                raise RowError(
                    "an answer that the chat template rewrites",
                    "the model's chat template leaves out or rewrites a part of the answer "
                    f"{short(answer['content'])}; {self._way_out}",
                )
            raise self._two_ways(rendered, rest)
        note = "the chat template would leave out or rewrite a part of the answer, which is learned as it was given"
        return Turn(mended, (note,))

    def _continued(self, messages: Sequence[Message], tools: Any) -> str:
        """Return a prompt that ends in a begun answer, which must stand at its end as it was given."""
        begun = str(messages[-1]["content"])
        opened = self.renderer.render(messages[:-1], tools, add_generation_prompt=True) if len(messages) > 1 else ""
        if not begun.strip() and opened:
            return opened
        text = self.renderer.render(messages, tools)
        before, found, _ = text.rpartition(begun.strip()) if begun.strip() else ("", "", "")
        as_given = not opened or before.rstrip() == opened.rstrip() or opened.startswith(before)
        if not found or not as_given:
            raise RowError(
                "a begun answer that the chat template rewrites",
                f"the prompt ends in a begun answer, {short(begun)}, which the model's chat template leaves out or "
                f"rewrites; remove it from the prompt, {self._way_out}",
            )
        return before + begun.lstrip()  # the white space at its end as well, whatever the template does to it

    def _as_given(self, prompt: Sequence[Message], rendered: str, given: str, tools: Any) -> str | None:
        """Return what is behind a rendered prompt for an answer as it was given; None: the template allows none."""
        plain = self.renderer.render([*prompt, {"role": "assistant", "content": SENTINEL}], tools)
        before, found, end = plain.rpartition(SENTINEL)
        if not found or not given.strip():
            return None
        if not rendered.startswith(before.rstrip()) and not before.startswith(rendered):
            return None
        if rendered.rstrip().endswith(THINK[0]) and THINK[1] not in given:
            return None  # the prompt has opened reasoning that the answer does not close
        return unopened(rendered, given) + end

    def _two_ways(self, rendered: str, answer: str) -> RowError:
        """Return the error of a prompt that is written in one way before and in another once it is answered."""
        may_think = "enable_thinking" in self.renderer.source and "enable_thinking" not in self.renderer.options
        without = "set data.chat_template_kwargs={enable_thinking: false}, " if may_think else ""
        if rendered.rstrip().endswith(THINK[0]) and THINK[1] not in answer:
            return RowError(
                "an answer without the reasoning that the prompt opens",
                f"the model's chat template ends the prompt in {THINK[0]}, which the answer {short(answer)} does not "
                f"close; {without}put its reasoning and {THINK[1]} in front of it, {self._way_out}",
            )
        return RowError(
            "a prompt that the chat template writes in two ways",
            "the model's chat template does not write the prompt in the same way before and after it is answered, "
            f"so that what is learned cannot be told from it; {without}{self._way_out}",
        )

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
                    f"{short(str(message['content']))}; put it into another message, {self._way_out}",
                )
            start = found + len(content)
            if (written := str(message["content"])) not in text:
                kind = "trims" if written.strip() in text else "changes"
                note(f"the chat template {kind} white space of a message of the prompt")
