"""What a model is by the content of its files, told in a second for gigabytes. No torch here.

Some blocks of each tensor are read, spread evenly over it: weights that training changed differ in nearly every one,
and a copy is the same however it is cut into files. Two models whose fingerprints differ are different; two that agree
were not changed by any training of all their weights or of whole layers.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.source import is_local, resolve_model
from lowmem_rlhf.architecture.weight_files import INDEX, SINGLE, header
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.base_file import Fingerprint

BLOCK = 16 * 1024  # bytes read at a place
PLACES = 2048  # in all tensors of a model, one in each of them at least
GGUF_HEAD, GGUF_BLOCK, GGUF_BLOCKS = 1 << 20, 64 * 1024, 64
# of config.json: what a library writes about itself, and the dtype, which the weights tell
UNTOLD = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
FRAME = ("bos_token", "eos_token", "add_bos_token", "add_eos_token")  # of tokenizer_config.json


def fingerprint(model: str, revision: str | None = None) -> Fingerprint | None:
    """Return the fingerprint of a model; None where its files are not (all) on this machine, or are none.

    Args:
        model: as in a recipe; of a Hub id the snapshot in the Hub's cache is read, and the network is left alone.
        revision: of a Hub id.
    """
    try:
        resolved = resolve_model(model)
    except UserError:
        return None
    commit = None
    if is_local(resolved):
        path = Path(resolved)
    else:
        from lowmem_rlhf.architecture.hub import cached_config

        config = cached_config(resolved, revision)
        if config is None:
            return None
        path, commit = config.parent, config.parent.name
    try:
        if path.is_file():
            return Fingerprint("gguf", _gguf(path, *_version(path)))
        if not (files := _weight_files(path)):
            return None
        weights = _safetensors(tuple((file, *_version(file)) for file in files))
        return Fingerprint("safetensors", weights, _config(path), _tokenizer(path), commit)
    except (OSError, ValueError, TypeError, KeyError):  # files that are no model; loading them says what they are
        return None


def weights_fingerprint(file: Path) -> str | None:
    """Return the hash of the tensors of one safetensors file, such as an adapter's; None where it cannot be read."""
    try:
        return _safetensors(((file, *_version(file)),))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _version(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads; none where one is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    else:
        files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_model"))
    return files if all(file.is_file() for file in files) else []


@lru_cache(maxsize=32)
def _safetensors(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return the hash of tensors, whatever file they lie in."""
    headers = [(file, *header(file)) for file, _, _ in files]
    names = [name for _, _, tensors in headers for name in tensors]
    ends = [
        data + max((told["data_offsets"][1] for told in tensors.values()), default=0) for _, data, tensors in headers
    ]
    if len(set(names)) < len(names) or any(end > size for end, (_, size, _) in zip(ends, files, strict=True)):
        raise ValueError("files that were mixed up or cut off")
    many = max(1, PLACES // max(1, sum(len(tensors) for _, _, tensors in headers)))
    digests: dict[str, str] = {}
    for path, data, tensors in headers:
        with path.open("rb") as file:
            for name, told in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = told["data_offsets"]
                digest = hashlib.sha256(json.dumps([name, told["dtype"], told["shape"]]).encode())
                _sample(file, digest, data + begin, data + end, many, BLOCK)
                digests[name] = digest.hexdigest()
    return hashlib.sha256("".join(f"{name}:{digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _sample(file: Any, digest: Any, begin: int, end: int, many: int, block: int) -> None:
    """Add blocks of the bytes from begin to end, the first and the last among them where there are two or more."""
    room = end - begin
    if room <= many * block:
        places, block = [begin], room
    elif many == 1:
        places = [begin + (room - block) // 2]
    else:
        places = [begin + (room - block) * place // (many - 1) for place in range(many)]
    for place in places:
        file.seek(place)
        digest.update(file.read(block))


@lru_cache(maxsize=32)
def _gguf(path: Path, size: int, _modified: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(GGUF_HEAD))
        _sample(file, digest, 0, size, GGUF_BLOCKS, GGUF_BLOCK)
    return digest.hexdigest()


def _config(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = {key: value for key, value in config.items() if key not in UNTOLD}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _tokenizer(folder: Path) -> str | None:
    names = next((names for names in VOCABULARIES if all((folder / name).is_file() for name in names)), None)
    if names is None:
        return None
    digest = hashlib.sha256()
    for name in names:
        digest.update((folder / name).read_bytes())
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = {key: settings[key] for key in FRAME if settings.get(key) is not None}
    frame = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    template = _chat_template(folder, settings)
    return hashlib.sha256(f"{digest.hexdigest()}\n{json.dumps(frame)}\n{template}".encode()).hexdigest()


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    """Return the chat template as its text, which lies in a file of its own or in the tokenizer's settings."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    value = settings.get("chat_template")
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
