"""A model's tokenizer and what its configuration says of tokens, without its weights. No torch until it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.source import is_local, resolve_model
from lowmem_rlhf.architecture.stops import stop_ids_of, turn_end
from lowmem_rlhf.errors import OfflineError, UserError, one_line


@dataclass(frozen=True)
class Tokens:
    """What turns texts into token ids, and which of them a model has.

    Attributes:
        tokenizer: the model's.
        stop_ids: the tokens that end a completion.
        rows: rows of the token embedding; None: the configuration does not say.
    """

    tokenizer: Any
    stop_ids: frozenset[int]
    rows: int | None


def load_tokens(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    network: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tokens | None:
    """Return the tokens of a model, of which no weights are read.

    Args:
        model: as in a recipe.
        network: whether the Hub may be asked for files that are not on this disk.
        chat_template_kwargs: given to the chat template, which says what ends a turn.

    Returns:
        None where the files are on the Hub, not on this disk, and the Hub may not be asked.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from lowmem_rlhf.engine.load import converted_folder, quiet

    path = resolve_model(model)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if path.endswith(".gguf"):
        folder = converted_folder(Path(path))
        source = str(folder) if folder.is_dir() else str(Path(path).parent)
        options = {} if folder.is_dir() else {"gguf_file": Path(path).name}
    elif is_local(path):
        source = path
    else:
        source = path
        options["local_files_only"] = not network
    with quiet():
        try:
            config = AutoConfig.from_pretrained(source, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except Exception as error:
            if not network and not is_local(path):
                return None
            reason = one_line(error)[:300]
            raise (UserError if is_local(path) else OfflineError)(
                f"model {model!r}: its tokenizer cannot be loaded: {reason}; give a Hub id that can be reached, a "
                "local folder in the transformers format, or a .gguf file"
            ) from error
        try:
            generation = GenerationConfig.from_pretrained(source, **options)
        except Exception:  # most models that are no chat models have none
            generation = None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    ends = turn_end(tokenizer, **(chat_template_kwargs or {}))
    return Tokens(tokenizer, stop_ids_of(tokenizer, config, generation, ends), rows)
