"""An Ollama folder: a GGUF, and the Modelfile that makes a model of it by ``ollama create NAME -f Modelfile``."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lowmem_rlhf.export.gguf.write import second_stop
from lowmem_rlhf.export.ollama.formats import FORMATS, LLAMA31_DATE, Format, Message
from lowmem_rlhf.export.tokenizer import chat_template, load_tokenizer
from lowmem_rlhf.files import atomic_write
from lowmem_rlhf.progress import message

Parameters = Mapping[str, float | int | str | None]
SYSTEM: Message = {"role": "system", "content": "S0"}
PROBE: list[Message] = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]
_MARK = "\x00"
_CONTEXT = 4096  # tokens, of which Ollama reserves memory; a user asks for more with num_ctx


@dataclass(frozen=True)
class DetectedFormat:
    """The format that a tokenizer's chat template writes.

    Attributes:
        system: the default text, for conversations without a system turn.
    """

    format: Format
    system: str = ""


def detect_format(tokenizer: Any) -> DetectedFormat | None:
    """Return the known format whose text of a conversation equals the chat template's; None if there is none.

    Conversations without and with a system text are compared. If the template refuses a system text, or places it where
    none of the formats does, the format is returned without a place for it.
    """
    plain, with_system = _text(tokenizer, PROBE), _text(tokenizer, [SYSTEM, *PROBE])
    if plain is None:
        return None
    for one in FORMATS:
        system = _default_system(one, plain)
        if system is None:
            continue
        if one.system is None and one.render([SYSTEM, *PROBE]) != with_system:
            return DetectedFormat(replace(one, merged=None))
        if one.render([SYSTEM, *PROBE]) == with_system:
            return DetectedFormat(one, system)
    return None


def _text(tokenizer: Any, messages: list[Message]) -> str | None:
    """Return what the template writes, without the BOS that Ollama puts before every text; None if it refuses."""
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string=LLAMA31_DATE
        )
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    return str(text).removeprefix(tokenizer.bos_token or "")


def _default_system(one: Format, plain: str) -> str | None:
    """Return the system text that stands in a conversation without one; None if it is not of the format."""
    if one.render(PROBE) == plain:
        return ""
    if one.system is None:
        return None
    marked = [{"role": "system", "content": _MARK}, *PROBE]
    before, after = one.render(marked).split(_MARK)
    fits = plain.startswith(before) and plain.endswith(after) and len(plain) > len(before) + len(after)
    return plain[len(before) : -len(after)] if fits else None


def modelfile(
    gguf: str, tokenizer: Any, parameters: Parameters, stops: list[str], stop_strings: Sequence[str] = ()
) -> tuple[str, str]:
    """Return a Modelfile, and a sentence on its template.

    Args:
        gguf: the file's name.
        parameters: Ollama's; those that are None are left out.
        stops: texts of the tokens that end an answer.
        stop_strings: texts of the recipe that end one.
    """
    lines = [f"FROM ./{gguf}"]
    detected = detect_format(tokenizer)
    if chat_template(tokenizer) is None:
        note = "the model has no chat template: Ollama gives it prompts as they are"
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif detected is None:
        note = (
            "the chat template is none that is known here, so the Modelfile has no TEMPLATE and Ollama reads the GGUF's"
        )
    else:
        placed = detected.format.system or detected.format.merged
        note = f"the chat template is {detected.format.name}'s" + (
            "" if placed else "; a system text has no place in it"
        )
        lines.append(f'TEMPLATE """{detected.format.template()}"""')
        if '"""' in detected.system or detected.system.endswith('"'):
            note += "; its default system text holds quotes that a Modelfile cannot, and is left out"
        elif detected.system:
            lines.append(f'SYSTEM """{detected.system}"""')
        stops = [detected.format.stop, *stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items() if value is not None]
    stops = [stop for stop in stops if stop.strip() and '"' not in stop and stop.isprintable()]
    fitting = [stop for stop in stop_strings if _can_be_quoted(stop)]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys([*stops, *fitting])]
    if left_out := [stop for stop in stop_strings if stop not in fitting]:
        note += f"; a Modelfile cannot hold the stop strings {', '.join(map(repr, left_out))}, which are left out"
    return "\n".join(lines) + "\n", note


def _can_be_quoted(text: str) -> bool:
    """Whether a text can stand in quotes in a Modelfile, which knows no escapes and keeps line feeds and tabs."""
    whole = '"""' not in text and not text.startswith('"') and not text.endswith('"')
    return whole and all(letter.isprintable() or letter in "\n\t" for letter in text)


def _quoted(text: str) -> str:
    quotes = '"""' if '"' in text else '"'
    return f"{quotes}{text}{quotes}"


def write_ollama(
    folder: Path, gguf: Path, target: Path, parameters: Parameters, stop_strings: Sequence[str] = ()
) -> None:
    """Write the Modelfile and place the GGUF beside it, as a hard link where the file system has them.

    Args:
        folder: the merged model, for its tokenizer and configuration.
        gguf: the weights; they may lie in ``target`` already.
        target: the folder; made if it is not there.
        parameters: Ollama's, for example temperature and num_ctx; None leaves one out. ``num_ctx`` is by default the
            model's context, at most 4096 tokens.
        stop_strings: texts that end an answer, beside the model's own ends.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    from transformers import AutoConfig

    tokenizer, config = load_tokenizer(folder), AutoConfig.from_pretrained(folder)
    ends = (tokenizer.eos_token_id, second_stop(folder, config, tokenizer))
    stops = [str(tokenizer.convert_ids_to_tokens(end)) for end in ends if end is not None]
    context = min(_CONTEXT, getattr(config, "max_position_embeddings", None) or _CONTEXT)
    text, note = modelfile(gguf.name, tokenizer, {"num_ctx": context, **parameters}, stops, stop_strings)
    target.mkdir(parents=True, exist_ok=True)
    placed = target / gguf.name
    if placed.resolve() != gguf.resolve():
        placed.unlink(missing_ok=True)
        try:
            os.link(gguf, placed)
        except OSError:  # another file system
            shutil.copyfile(gguf, placed)
    atomic_write(target / "Modelfile", text)
    message(note)
