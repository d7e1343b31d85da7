"""Chat formats, each as a text and as a Go template of Ollama, both made of the same pieces. No torch here.

Sources: the chat templates that the models' makers ship; Ollama's docs/template.md for the variables and functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

Message = dict[str, str]
LLAMA31_DATE = "26 Jul 2024"  # which Llama 3.1's template names where it is given no date


@dataclass(frozen=True)
class Format:
    """How a chat is written.

    Attributes:
        user, assistant: what stands before and after a turn's content.
        answer: what a new answer begins with; None: as an assistant's turn does.
        system: the same of a system turn; None: the format has no such turn.
        merged: where it has none, what stands around the system text before the first user's content; None: a system
            text has no place.
        stop: ends an answer.
        always: a system turn without a text is written too.
    """

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    stop: str
    system: tuple[str, str] | None = None
    merged: tuple[str, str] | None = None
    always: bool = False
    answer: str | None = None

    @property
    def begin(self) -> str:
        """What a new answer begins with."""
        return self.assistant[0] if self.answer is None else self.answer

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation and the beginning of the next answer, without the BOS token."""
        text = ""
        system = next((one["content"] for one in messages if one["role"] == "system"), "")
        if self.system and (system or self.always):
            text = self.system[0] + system + self.system[1]
        pending = self.merged[0] + system + self.merged[1] if self.merged and system else ""
        for message in messages:
            content = message["content"]
            if message["role"] == "user":
                text += self.user[0] + pending + content + self.user[1]
                pending = ""
            elif message["role"] == "assistant":
                text += self.assistant[0] + content + self.assistant[1]
        return text + self.begin

    def template(self) -> str:
        """Return the same as a Go template.

        Nothing is trimmed and no space stands between actions, since spaces and line ends belong to the formats. An
        assistant's turn that comes last is left open, and gone on with.
        """
        head, pending = "", ""
        if self.system:
            head = f"{self.system[0]}{{{{ .System }}}}{self.system[1]}"
            head = head if self.always else f"{{{{ if .System }}}}{head}{{{{ end }}}}"
        if self.merged:
            head = "{{ $system := .System }}"
            shown = f'{self.merged[0]}{{{{ $system }}}}{self.merged[1]}{{{{ $system = "" }}}}'
            pending = f"{{{{ if $system }}}}{shown}{{{{ end }}}}"
        last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        begin = f"{{{{ if $last }}}}{self.begin}{{{{ end }}}}" if self.begin else ""
        user = f"{self.user[0]}{pending}{{{{ .Content }}}}{self.user[1]}{begin}"
        assistant = f"{self.assistant[0]}{{{{ .Content }}}}{{{{ if not $last }}}}{self.assistant[1]}{{{{ end }}}}"
        turns = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
        return f"{head}{{{{ range $i, $_ := .Messages }}}}{last}{turns}{{{{ end }}}}"


def _turns(name: str, before: str, after: str, stop: str, system_text: str = "", model: str = "assistant") -> Format:
    """Return a format whose turns differ by the role only, which stands for ROLE."""
    return Format(
        name,
        user=(before.replace("ROLE", "user"), after),
        assistant=(before.replace("ROLE", model), after),
        stop=stop,
        system=(before.replace("ROLE", "system") + system_text, after),
        always=bool(system_text),
    )


def _mistral(name: str, user: tuple[str, str], assistant: str) -> Format:
    return Format(name, user, (assistant, "</s>"), "</s>", merged=("", "\n\n"), answer="")


_CHATML = ("<|im_start|>ROLE\n", "<|im_end|>\n", "<|im_end|>")
_LLAMA3 = ("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>")
_GEMMA = (("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n"), "<end_of_turn>")
FORMATS = (
    _turns("ChatML", *_CHATML),
    # Qwen3.5, whose answers follow an empty thought, or one that the prompt has opened
    replace(_turns("ChatML, no thought", *_CHATML), answer="<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    replace(_turns("ChatML, thinking", *_CHATML), answer="<|im_start|>assistant\n<think>\n"),
    _turns("Llama 3", *_LLAMA3),
    _turns("Llama 3.1", *_LLAMA3, f"Cutting Knowledge Date: December 2023\nToday Date: {LLAMA31_DATE}\n\n"),
    Format(
        "Llama 2",
        ("[INST] ", " [/INST]"),
        (" ", " </s><s>"),  # the next turn begins with a BOS of its own
        "</s>",
        merged=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        answer="",
    ),
    _mistral("Mistral 0.1", ("[INST] ", " [/INST]"), ""),
    _mistral("Mistral", ("[INST] ", " [/INST]"), " "),
    _mistral("Mistral 0.2", (" [INST] ", " [/INST]"), " "),
    _mistral("Mistral 0.3", ("[INST] ", "[/INST]"), " "),
    _mistral("Mistral Nemo", ("[INST]", "[/INST]"), ""),
    Format("Mistral 7", ("[INST]", "[/INST]"), ("", "</s>"), "</s>", system=("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    _turns("Gemma 4", "<|turn>ROLE\n", "<turn|>\n", "<turn|>", model="model"),
    _turns("Granite", "<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\n", "<|end_of_text|>"),
    Format("Gemma", *_GEMMA, merged=("", "\n\n")),
    _turns("Zephyr", "<|ROLE|>\n", "</s>\n", "</s>"),
    _turns("Phi 3", "<|ROLE|>\n", "<|end|>\n", "<|end|>"),
    _turns("Phi 4", "<|im_start|>ROLE<|im_sep|>", "<|im_end|>", "<|im_end|>"),
    _turns("Phi 4 mini", "<|ROLE|>", "<|end|>", "<|end|>"),
)
