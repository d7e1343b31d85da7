"""How texts begin and turns end in an export: as in the run that trained it, whatever the tokenizer does."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.stops import turn_end
from lowmem_rlhf.data.chat_template import is_chat
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.source import read_config
from lowmem_rlhf.export.tokenizer import load_tokenizer, own_frame
from lowmem_rlhf.recipe.sections import DataConfig, GenerationConfig

_TURNS = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Framing:
    """What llama.cpp and Ollama put around a prompt.

    Attributes:
        add_bos: whether a BOS comes before every text; llama.cpp does not double one that the chat template writes.
        notes: a sentence for each difference from what the tokenizer does.
    """

    add_bos: bool
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return what export.json says of it."""
        return {"add_bos_token": self.add_bos, "add_eos_token": False, "notes": list(self.notes)}


def framing(tokenizer: Any, data: DataConfig) -> Framing:
    """Return how a run's prompts began; none of them ended in an EOS.

    Chats begin with what the chat template writes, plain prompts with what the tokenizer puts before every text.
    """
    own, ends = own_frame(tokenizer)
    bos, notes = own, []
    if data.text is None and is_chat(data, tokenizer) and (ids := _chat_ids(tokenizer, data)) is not None:
        first = tokenizer("a")["input_ids"][0] if own else tokenizer.bos_token_id
        begins = first is not None and ids[:1] == [first]
        # One that occurs again marks roles (SmolLM2's): the template itself writes it wherever it belongs.
        bos = begins and (own or ids.count(first) == 1)
        token = tokenizer.convert_ids_to_tokens(first) if first is not None else None
        if own and not bos:
            notes.append(
                f"add_bos_token=false: the chats that were trained on begin without {token}, which the tokenizer puts "
                "before every text"
            )
        if bos and not own:
            notes.append(
                f"add_bos_token=true: the chats that were trained on begin with {token}, which the tokenizer itself "
                "puts before no text"
            )
    if ends:
        notes.append("add_eos_token=false: the tokenizer ends every text, and no prompt of the run was ended")
    return Framing(bos, tuple(notes))


def end_turns(folder: Path) -> tuple[str, ...]:
    """Add the token that ends a turn to a model folder's generation config; return a sentence if it was missing.

    Raises:
        OSError: the file cannot be written.
    """
    with suppress(UserError, ValueError):  # no tokenizer: then nobody chats with it; or JSON that nobody can read
        tokenizer, config, named = load_tokenizer(folder), read_config(folder), _generation_values(folder)
        eos = named.get("eos_token_id", config.get("eos_token_id"))
        ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if new := sorted(turn_end(tokenizer).difference(ends)):
            _write_generation(folder, {**named, "eos_token_id": [*ends, *new]})
            names = ", ".join(str(tokenizer.convert_ids_to_tokens(one)) for one in new)
            return (f"{GENERATION} names {names} as an end too: the chat template ends a turn with it",)
    return ()


def keep_controls(folder: Path, generation: GenerationConfig) -> tuple[str, ...]:
    """Put a run's repetition penalty and least length into a model folder's generation config.

    Temperature and what top-p and the like leave out stay the base's: they are for whoever samples to say, these are
    a part of what the policy was rewarded for. Stop strings are told alone: with them in the file every call of
    transformers' ``generate`` that is not given the tokenizer would be an error.

    Returns:
        Sentences on what was written; none where the run has none of them.

    Raises:
        OSError: the file cannot be written.
    """
    kept, notes = generation.controls, tuple[str, ...]()
    if strings := kept.pop("stop_strings", None):
        given = f"stop_strings={json.dumps(strings, ensure_ascii=False)}, tokenizer=tokenizer"
        notes = (f"the run's completions ended at stop strings: give generate() of transformers {given}",)
    if not kept:
        return notes
    values = {**_generation_values(folder), **kept}
    values.pop("_from_model_config", None)  # of a file that only repeats the model's configuration
    _write_generation(folder, values)
    shown = ", ".join(f"{key}={json.dumps(value)}" for key, value in kept.items())
    return (f"{GENERATION} has {shown}, as in the run", *notes)


def _generation_values(folder: Path) -> dict[str, Any]:
    """Return what a model folder's generation config holds, or if none can be read, what transformers makes one of."""
    path, saved = folder / GENERATION, None
    with suppress(ValueError):  # transformers goes on without it, too
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if saved and isinstance(saved, dict):
        return saved
    config = read_config(folder)
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _write_generation(folder: Path, values: Mapping[str, Any]) -> None:
    (folder / GENERATION).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def keep_template_options(folder: Path, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Make the template options of the run the defaults of a model folder's chat template; return a sentence on them.

    A value that a caller gives the template still takes precedence.

    Raises:
        OSError: a file cannot be written.
    """
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    saved = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    template = own.read_text(encoding="utf-8") if own.is_file() else saved.get("chat_template")
    if not options or not isinstance(template, str):
        return ()
    defaults = (
        f"{{%- if {key} is not defined %}}{{%- set {key} = {_literal(value)} %}}{{%- endif %}}"
        for key, value in options.items()
    )
    template = "".join(defaults) + template
    if own.is_file():
        own.write_text(template, encoding="utf-8")
    else:
        config.write_text(json.dumps({**saved, "chat_template": template}, indent=2) + "\n", encoding="utf-8")
    shown = ", ".join(f"{key}={_literal(value)}" for key, value in options.items())
    return (f"the chat template takes {shown} where nothing else is given, as in the run",)


def _literal(value: Any) -> str:
    """Return a value as a Jinja literal; lists, texts and truth values are written as in JSON."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _chat_ids(tokenizer: Any, data: DataConfig) -> list[int] | None:
    """Return the ids of a chat as the run wrote it; None if the template refuses every such chat."""
    system = [{"role": "system", "content": data.system}] if data.system else []
    for messages in ([*system, *_TURNS], _TURNS, _TURNS[:1]):
        with suppress(Exception):  # whatever a template raises
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **data.chat_template_kwargs
            )
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return None
