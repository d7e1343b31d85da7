"""What a model card says of the base, the machine and the recipe, without the folders of the machine it was made on."""

import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

import lowmem_rlhf
from lowmem_rlhf import __version__
from lowmem_rlhf.architecture.source import is_local, resolve_model
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.data_sources import is_file, is_folder, is_generated

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
PATH_KEYS = ("model", "adapter", "train", "eval", "function")  # of a recipe, whose values may be paths


def is_hub_id(model: str) -> bool:
    """Whether a model is named by a Hub id and not by a file or folder."""
    try:
        return not model.startswith("package:") and not is_local(resolve_model(model))
    except UserError:
        return False  # a folder that is gone


def model_name(model: str) -> str:
    """Return a Hub id as it is, and of anything local the last part."""
    return model if is_hub_id(model) else last_part(model.removeprefix("package:"))


def hub_datasets(data: dict[str, Any]) -> list[str]:
    """Return the Hub ids among the data sources of a recipe."""
    sources = [source for source in (data.get("train"), data.get("eval")) if source and not _with_folder(source)]
    return list(dict.fromkeys(s for s in sources if not (is_generated(s) or is_file(s) or is_folder(s))))


def without_folders(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a recipe's values with the folders of local files taken away, and those files by dotted key.

    Relative paths say nothing of the machine and stay.
    """
    local: dict[str, str] = {}

    def cleaned(value: Any, key: str, may_be_path: bool) -> Any:
        if isinstance(value, dict):
            inside = may_be_path and key.endswith("options")
            dot = f"{key}." if key else ""
            return {
                k: cleaned(v, f"{dot}{k}", inside or k in (*PATH_KEYS, "rewards", "options")) for k, v in value.items()
            }
        if isinstance(value, list):
            return [cleaned(v, f"{key}[{i}]", may_be_path) for i, v in enumerate(value)]
        if isinstance(value, str) and may_be_path and _with_folder(value):
            local[key] = value
            return last_part(value)
        return value

    return {key: cleaned(value, key, key in (*PATH_KEYS, "data", "rewards")) for key, value in values.items()}, local


def _with_folder(text: str) -> bool:
    """Whether a text is a path that begins in a folder of this machine."""
    absolute = PurePosixPath(text).is_absolute() or bool(PureWindowsPath(text).drive)
    return absolute or text.startswith(("~", "..", "\\\\"))


def last_part(path: str) -> str:
    """Return a path's last part."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def license_of(model: str) -> str:
    """Return the licence that the base names itself (in its README, or a GGUF's header); ``unknown`` if it does not.

    Of a Hub id what lies in the local cache is read, and the network is left alone.
    """
    with contextlib.suppress(UserError, OSError, ValueError):
        path = Path(resolve_model(model))
        if path.suffix == ".gguf":
            from lowmem_rlhf.architecture.gguf_header import read_gguf_header

            return str(read_gguf_header(path).fields.get("general.license") or "unknown")
        readme = path / "README.md" if path.is_dir() else _cached_readme(model)
        if readme is not None and readme.is_file():
            return _front_matter(readme.read_text(encoding="utf-8", errors="replace")).get("license") or "unknown"
    return "unknown"


def _cached_readme(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "README.md")
    return Path(found) if isinstance(found, str) else None


def _front_matter(text: str) -> dict[str, str]:
    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    with contextlib.suppress(yaml.YAMLError):
        values = yaml.safe_load(match[1]) if match else None
        if isinstance(values, dict):
            return {str(key): value for key, value in values.items() if isinstance(value, str)}
    return {}


def versions() -> dict[str, str]:
    """Return the versions that made the export: this package with its commit, Python and the libraries."""
    found = {"lowmem_rlhf": f"{__version__} ({commit})" if (commit := _commit()) else __version__}
    found["python"] = platform.python_version()
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str:
    """Return the commit of the checkout that this package runs from, or that it was installed from; else nothing."""
    folder = Path(lowmem_rlhf.__file__).resolve().parents[1]
    if (folder / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        direct = importlib.metadata.distribution("lowmem-rlhf").read_text("direct_url.json")
        return str(json.loads(direct or "{}").get("vcs_info", {}).get("commit_id", ""))[:12]
    return ""
