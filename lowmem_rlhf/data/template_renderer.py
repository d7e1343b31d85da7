"""A chat template as a program: what it writes of messages, and what can be known of it by trying. No torch here."""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.messages import Message, with_text_arguments
from lowmem_rlhf.data.rendered import THINK, shows_mapping
from lowmem_rlhf.errors import one_line
from lowmem_rlhf.suggest import did_you_mean

SENTINEL = "Zq7x"  # a text that no template knows, for finding where an answer stands


class TemplateRenderer:
    """Writes messages as a tokenizer's chat template does.

    Args:
        tokenizer: has a chat template.
        options: given to the template with every call (`data.chat_template_kwargs`).
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any]) -> None:
        self._tokenizer, self.options = tokenizer, options
        templates = tokenizer.chat_template
        self.source = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)

    def render(self, messages: Sequence[Message], tools: Any, **options: Any) -> str:
        """Return the text of messages.

        Args:
            options: arguments of the template, such as ``add_generation_prompt``.

        Raises:
            RowError: the template refuses the messages.
        """
        given = {"add_generation_prompt": False, **options, **self.options}
        if tools:
            given["tools"] = tools

        def written(some: Sequence[Message]) -> str:
            if self._takes_parts:
                some = [{**one, "content": _as_part(one["content"])} for one in some]
            return str(self._tokenizer.apply_chat_template(list(some), tokenize=False, **given))

        try:
            text = written(messages)
            return written(with_text_arguments(messages)) if shows_mapping(messages, text) else text
        except Exception as error:  # a template is a program, and may fail as one
            if (other := with_text_arguments(messages)) != messages:
                with suppress(Exception):  # those that want text, as OpenAI's messages have it (DeepSeek-V3)
                    return written(other)
            roles = ", ".join(str(one["role"]) for one in messages)
            reason = one_line(error)
            hint = (
                "; for a template without a system role, leave data.system out or put it into data.template"
                if any(one["role"] == "system" for one in messages)
                else ""
            )
            raise RowError(
                "messages that the chat template refuses",
                f"the model's chat template refuses these messages ({roles}): {reason[:300]}{hint}",
            ) from error

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether texts are written only where content is a list of parts, as by templates of models for images."""

        def shows(content: Any) -> bool:
            with suppress(Exception):
                asked = [{"role": "user", "content": content}]
                return SENTINEL in str(self._tokenizer.apply_chat_template(asked, tokenize=False, **self.options))
            return False

        return not shows(SENTINEL) and shows(_as_part(SENTINEL))

    def names_role(self, role: str) -> bool:
        """Return whether the template's source names a role."""
        return bool(role.strip()) and re.search(rf"""["']{re.escape(role)}["']""", self.source) is not None

    @cached_property
    def unread_options(self) -> str:
        """What is to be said of keyword arguments whose names the template's source lacks; empty: nothing."""
        unread = [name for name in self.options if not re.search(rf"\b{re.escape(name)}\b", self.source)]
        if not unread:
            return ""
        near = did_you_mean(unread[0], set(re.findall(r"\b[a-z]\w*_\w+", self.source)))
        return f"the chat template reads no {', '.join(unread)} (data.chat_template_kwargs){near}"

    @cached_property
    def header_left_out(self) -> str:
        """What stands before answers, where the template lets no prompt end in it; empty: prompts do, or nothing does.

        Such a template does not look at ``add_generation_prompt``.
        """
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}
        try:
            prompt = self.render([asked], None, add_generation_prompt=True)
            whole = self.render([asked, answered], None)
            if prompt != self.render([asked], None) or not whole.startswith(prompt):
                return ""
        except RowError:
            return ""
        header = whole[len(prompt) :].partition(SENTINEL)[0]
        return header if header.strip() else ""

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The special tokens with which the template marks turns; in a text they would be read as such a mark."""
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        system = {"role": "system", "content": "c"}
        for probe in ([system, asked, answered, asked], [asked, answered, asked], [asked]):
            try:
                text = self.render(probe, None, add_generation_prompt=True) + self.render([*probe, answered], None)
            except RowError:
                continue
            return frozenset(token for token in self.special_tokens if token in text and token not in THINK)
        return frozenset()

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The special tokens and those that were added."""
        named = (*self._tokenizer.get_added_vocab(), *self._tokenizer.all_special_tokens)
        return frozenset(str(token) for token in named if str(token).strip())

    @cached_property
    def text_for_empty_system(self) -> str:
        """What the template writes in place of an empty system message: a text of its own; empty: none."""
        user = {"role": "user", "content": SENTINEL}

        def start(*system: str) -> str:
            return self.render([*({"role": "system", "content": one} for one in system), user], None).partition(
                SENTINEL
            )[0]

        try:
            own, empty, named = start(), start(""), start(SENTINEL)
        except RowError:
            return ""
        return empty.removeprefix(named) if own == empty and empty.startswith(named) and empty != named else ""


def _as_part(text: str) -> list[Message]:
    return [{"type": "text", "text": text}]
