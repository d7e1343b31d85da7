"""Facts for a model card on the base, its licence, the data and the versions, without this machine's folders."""

import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

import lowmem_rlhf
from lowmem_rlhf import __version__
from lowmem_rlhf.architecture.source import is_local, resolve_model
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.local_paths import has_folder, last_part
from lowmem_rlhf.recipe.data_sources import is_file, is_folder, is_generated
from lowmem_rlhf.recipe.python_objects import is_python

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_LICENSE = re.compile(r"[\w.+-]{1,60}", re.ASCII)
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def is_hub_id(model: str) -> bool:
    """Whether a model is named by a Hub id and not by a file or folder."""
    try:
        return bool(HUB_ID.fullmatch(model)) and not is_local(resolve_model(model))
    except UserError:
        return False  # a folder that is gone


def model_name(model: str) -> str:
    """Return a Hub id as it is, and only the last part of a local path."""
    return model if is_hub_id(model) else last_part(model.removeprefix("package:"))


def hub_datasets(data: dict[str, Any]) -> list[str]:
    """Return the Hub ids among the data sources of a recipe."""
    sources = [source for source in (data.get("train"), data.get("eval")) if source and not has_folder(source)]
    here = (is_generated, is_python, is_file, is_folder)
    return list(dict.fromkeys(one for one in sources if HUB_ID.fullmatch(one) and not any(test(one) for test in here)))


def data_by_task(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the `data` of each task of a recipe's values, or of the recipe itself, named by an empty text."""
    tasks = {str(task.get("name")): task.get("data") or {} for task in recipe.get("tasks") or ()}
    return tasks or {"": recipe.get("data") or {}}


def license_of(model: str) -> str:
    """Return the licence that the base itself names in its README or GGUF header; ``unknown`` if it names none.

    What is no identifier of a licence is ``other``.

    Of a Hub id what lies in the local cache is read, and the network is left alone.
    """
    with contextlib.suppress(UserError, OSError, ValueError):
        path = Path(resolve_model(model))
        if path.suffix == ".gguf":
            from lowmem_rlhf.architecture.gguf_header import read_gguf_header

            return _licence(read_gguf_header(path).fields.get("general.license"))
        readme = path / "README.md" if path.is_dir() else _cached_readme(model)
        if readme is not None and readme.is_file():
            return _licence(_front_matter(readme.read_text(encoding="utf-8", errors="replace")).get("license"))
    return "unknown"


def _licence(named: Any) -> str:
    text = str(named or "unknown").strip()
    return text if _LICENSE.fullmatch(text) else "other"


def _cached_readme(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model, "README.md")
    return Path(path) if isinstance(path, str) else None


def _front_matter(text: str) -> dict[str, str]:
    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    with contextlib.suppress(yaml.YAMLError):
        values = yaml.safe_load(match[1]) if match else None
        if isinstance(values, dict):
            return {str(key): value for key, value in values.items() if isinstance(value, str)}
    return {}


def versions() -> dict[str, str]:
    """Return the versions that made the export: this package with its commit, Python and the libraries."""
    made_with = {"lowmem_rlhf": f"{__version__} ({commit})" if (commit := _commit()) else __version__}
    made_with["python"] = platform.python_version()
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            made_with[name] = importlib.metadata.version(name)
    return made_with


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
