"""An Ollama folder: a GGUF and the Modelfile that makes a model of it, ``ollama create NAME -f Modelfile``.

Ollama writes prompts with Go templates. The known chat formats have one here; which of them a tokenizer's own (Jinja)
template is, is found by rendering a conversation with both and comparing the texts, not by any name.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.export.gguf_tokenizer import chat_template, load_tokenizer
from lowmem_rlhf.files import atomic_write

Message = dict[str, str]
PROBE: list[Message] = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]
SYSTEM: Message = {"role": "system", "content": "S0"}


@dataclass(frozen=True)
class Format:
    """How a chat is written.

    Attributes:
        name: what it is known as.
        system, user, assistant: around a turn's content; no system where the format has none of its own.
        answer: what an answer begins with.
        stop: what ends it.
        merged: the system's text stands before the first user's.
    """

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    stop: tuple[str, ...]
    system: tuple[str, str] | None = None
    merged: str = "\n\n"

    def render(self, messages: list[Message]) -> str:
        """Return the text of a conversation and the beginning of the next answer, without a BOS."""
        text, before = "", ""
        for message in messages:
            if message["role"] == "system" and self.system is None:
                before = message["content"] + self.merged
                continue
            first, last = {"user": self.user, "assistant": self.assistant, "system": self.system}[message["role"]]  # type: ignore[misc]
            text += first + before + message["content"] + last
            before = ""
        return text + self.answer

    def template(self) -> str:
        """Return the same as a Go template."""
        (user, after_user), (assistant, after_assistant) = self.user, self.assistant
        if self.system is not None:
            first, last = self.system
            head = f"{{{{- if .System }}}}{first}{{{{ .System }}}}{last}{{{{ end }}}}"
            inner = "{{ .Content }}"
        else:
            head = ""
            inner = f"{{{{ if and $.System (eq $i 0) }}}}{{{{ $.System }}}}{self.merged}{{{{ end }}}}{{{{ .Content }}}}"
        return (
            head + "{{- range $i, $_ := .Messages }}"
            f'{{{{- if eq .Role "user" }}}}{user}{inner}{after_user}'
            f'{{{{- else if eq .Role "assistant" }}}}{assistant}{{{{ .Content }}}}{after_assistant}'
            "{{- end }}{{- end }}" + self.answer
        )


def _chatml(name: str, end: str = "<|im_end|>") -> Format:
    def turn(role: str) -> tuple[str, str]:
        return f"<|im_start|>{role}\n", f"{end}\n"

    return Format(name, turn("user"), turn("assistant"), "<|im_start|>assistant\n", (end,), turn("system"))


def _llama3(role: str) -> tuple[str, str]:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"


def _lines(role: str, end: str) -> tuple[str, str]:
    return f"<|{role}|>\n", f"{end}\n"


FORMATS = (
    _chatml("ChatML"),
    Format(
        "Llama 3", _llama3("user"), _llama3("assistant"), _llama3("assistant")[0], ("<|eot_id|>",), _llama3("system")
    ),
    Format("Mistral", ("[INST] ", " [/INST]"), (" ", "</s>"), "", ("</s>",)),
    Format("Mistral v3", ("[INST] ", "[/INST]"), (" ", "</s>"), "", ("</s>",)),
    Format("Mistral v7", ("[INST]", "[/INST]"), ("", "</s>"), "", ("</s>",), ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    Format(
        "Gemma",
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        "<start_of_turn>model\n",
        ("<end_of_turn>",),
    ),
    *(
        Format(name, _lines("user", end), _lines("assistant", end), "<|assistant|>\n", (end,), _lines("system", end))
        for name, end in (("Zephyr", "</s>"), ("Phi 3", "<|end|>"))
    ),
)


def find_format(tokenizer: Any) -> Format | None:
    """Return the format that a tokenizer's chat template writes; None where it has none or one that is not known.

    A default system text that a template puts in by itself is not a difference: conversations with a system text are
    compared where the template takes one.
    """
    if chat_template(tokenizer) is None:
        return None
    texts = []
    for messages in ([SYSTEM, *PROBE], PROBE):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may raise whatever it likes, for example on a system text
            continue
        texts.append((messages, text.removeprefix(tokenizer.bos_token or "")))
    return next((one for one in FORMATS if texts and _same(one, *texts[0])), None)


def _same(one: Format, messages: list[Message], text: str) -> bool:
    return one.render(messages).strip() == text.strip()


def modelfile(gguf: str, tokenizer: Any, parameters: Mapping[str, float | int | str]) -> tuple[str, str]:
    """Return a Modelfile, and one sentence on its template."""
    found = find_format(tokenizer)
    lines = [f"FROM ./{gguf}"]
    if found is None:
        said = (
            "no known format writes this chat template: the Modelfile has no TEMPLATE, and Ollama reads the GGUF's own"
        )
    else:
        said = f"the chat template is {found.name}'s"
        lines.append(f'TEMPLATE """{found.template()}"""')
    stops = dict.fromkeys([*(found.stop if found else ()), *([tokenizer.eos_token] if tokenizer.eos_token else [])])
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n", said


def write_ollama(folder: Path, gguf: Path, target: Path, parameters: Mapping[str, float | int | str]) -> None:
    """Write the Modelfile beside the GGUF in ``target``, where the GGUF gets a hard link if it lies elsewhere.

    Args:
        folder: the merged model, for its tokenizer.
        gguf: the weights.
        target: an existing folder.
        parameters: Ollama's, for example temperature.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    placed = target / gguf.name
    if placed.resolve() != gguf.resolve():
        try:
            os.link(gguf, placed)
        except OSError:  # another file system
            shutil.copyfile(gguf, placed)
    text, said = modelfile(gguf.name, load_tokenizer(folder), parameters)
    atomic_write(target / "Modelfile", text)
    print(said, flush=True)
