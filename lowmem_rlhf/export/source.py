"""The base's files on disk: where they are, and which of them go along with merged weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.families.wrappers import text_config
from lowmem_rlhf.architecture.source import is_local, resolve_model
from lowmem_rlhf.errors import UserError

# files of a model folder other than weights: configuration, tokenizer, chat template, the model's own code
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
LEFT_OUT = ("config.json", "*.index.json", "training_args*", "adapter_config.json", "requirements*.txt")
FOR_OTHER_SENSES = ("*processor*.json",)  # how images and sound are read


def base_folder(model: str, revision: str | None) -> Path:
    """Return the folder with a model's safetensors weights, config and tokenizer.

    Args:
        model: as in a recipe. A GGUF file is converted once and cached; missing files of a Hub model are fetched.

    Raises:
        UserError: the base is gone, or cannot be fetched.
    """
    path = resolve_model(model)
    if path.endswith(".gguf"):
        from lowmem_rlhf.engine.load import convert_gguf

        return convert_gguf(Path(path))
    from lowmem_rlhf.engine.dequantized_source import dequantized_folder

    if (made := dequantized_folder(path, model, revision)) != path:
        return Path(made)
    return Path(path) if is_local(path) else _from_hub(path, revision)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from lowmem_rlhf.architecture.hub import cached_config, fetch_config
    from lowmem_rlhf.export.shards import read_shards

    cached = (cached_config(model, revision) or fetch_config(model, revision)).parent
    try:
        read_shards(cached)
        return cached
    except UserError as error:
        missing = error
    wanted = [*SIDE_FILES, "*.safetensors"]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
        read_shards(folder)
    except (UserError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(f"model {model!r} is not whole in the cache and cannot be fetched: {missing}") from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json.

    Raises:
        UserError: it cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); fetch the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object; fetch the model again")
    return config


def write_config(folder: Path, target: Path, dtype: str, text_alone: bool = False) -> None:
    """Write a model's config.json for weights that are stored in ``dtype`` and not quantized.

    Args:
        text_alone: see `copy_side_files`.
    """
    config = read_config(folder)
    if text_alone:
        config = dict(text_config(config))
    config.pop("quantization_config", None)
    config["dtype"] = dtype
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def side_files(folder: Path, text_alone: bool = False) -> list[Path]:
    """Return the files beside the weights that belong to the model: tokenizer, chat template, generation config, ...

    Args:
        text_alone: see `copy_side_files`.
    """
    left_out = (*LEFT_OUT, *(FOR_OTHER_SENSES if text_alone else ()))
    files = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    files |= {path for path in folder.glob("additional_chat_templates/*") if path.is_file()}
    return sorted(path for path in files if not any(path.match(pattern) for pattern in left_out))


def copy_side_files(folder: Path, target: Path, text_alone: bool = False) -> None:
    """Copy `side_files` (following the Hub cache's links).

    Args:
        text_alone: of a model for images or sound its text tower alone.
    """
    for path in side_files(folder, text_alone):
        place = target / path.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
