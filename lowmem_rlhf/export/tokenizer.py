"""The tokenizer of an exported folder, and what it puts around a text."""

from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError

WAY_OUT = "convert the merged folder (--format merged) with llama.cpp's convert_hf_to_gguf.py"


def load_tokenizer(folder: Path) -> Any:
    """Return a folder's tokenizer.

    Raises:
        UserError: there is none, or none with a tokenizer.json.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"the tokenizer in {folder} has no tokenizer.json, which a GGUF is written from; {WAY_OUT}")
    return tokenizer


def own_frame(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether a tokenizer puts a token before every text, and whether it puts one after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    at = next(index for index in range(len(framed)) if framed[index : index + len(bare)] == bare)
    return at > 0, len(framed) > at + len(bare)


def chat_template(tokenizer: Any) -> str | None:
    """Return the (default) chat template, if there is one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
