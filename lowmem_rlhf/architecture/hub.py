"""Fetching a model's config.json: from the Hugging Face cache when it is there, otherwise from the Hub."""

import re
from pathlib import Path

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.suggest import did_you_mean

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TIMEOUT_S = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubUnreachable(UserError):
    """The Hub cannot be reached, so nothing is known of a model that is not in its cache."""


def cached_config(model: str, revision: str | None = None) -> Path | None:
    """Return the config.json of a Hub model that was downloaded to this machine before; None if it was not."""
    return _cached(model, "config.json", revision)


def cached_adapter(repository: str) -> Path | None:
    """Return the folder of an adapter of the Hub that was downloaded to this machine before; None if it was not."""
    files = [_cached(repository, name) for name in ADAPTER_FILES]
    return files[0].parent if files[0] and all(files) else None


def _cached(model: str, name: str, revision: str | None = None) -> Path | None:
    """Return a file of a repository in the Hub's cache on this machine; None if it is not there.

    The layout of the cache (``models--ORG--NAME/refs``, ``snapshots``) is the one that huggingface_hub documents;
    reading it here spares a tenth of a second, which its downloading code takes to import.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    named = revision or constants.DEFAULT_REVISION
    ref = folder / "refs" / named
    try:
        commit = named if _COMMIT.fullmatch(named) else ref.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    path = folder / "snapshots" / commit / name
    return path if path.is_file() else None


def fetch_config(model: str, revision: str | None) -> Path:
    """Download a Hub model's config.json into the cache and return its path.

    Raises:
        HubUnreachable: there is no network.
        UserError: no such model or revision, or no access to it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
        _check_reachable(model)
        return Path(hf_hub_download(model, "config.json", revision=revision, etag_timeout=_TIMEOUT_S))
    except HFValidationError as error:
        raise UserError(f"model {model!r} is no Hub id: {error}") from error
    except GatedRepoError as error:
        raise UserError(
            f"model {model!r} is gated: accept its terms on https://huggingface.co/{model} and run `hf auth login`, "
            "or give model=LOCAL_FOLDER"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model {model!r} is not on the Hub, or is private: check the name, run `hf auth login`, "
            f"or give model=LOCAL_FOLDER{_known(model)}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model {model!r} has no revision {revision!r} on the Hub") from error
    except RemoteEntryNotFoundError as error:
        raise UserError(
            f"model {model!r} has no config.json on the Hub; if it holds only GGUF files, download one and give "
            "model=FILE.gguf"
        ) from error
    except OSError as error:
        raise _unreachable(model) from error


def fetch_adapter(repository: str) -> Path:
    """Download an adapter of the Hub into the cache and return its folder; a head beside it comes along.

    Raises:
        HubUnreachable: there is no network.
        UserError: no such repository, no access to it, or it holds no adapter with safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        _check_reachable(repository)
        wanted = [*ADAPTER_FILES, "head.safetensors", "base.json"]
        folder = Path(snapshot_download(repository, allow_patterns=wanted, etag_timeout=_TIMEOUT_S))
    except GatedRepoError as error:
        raise UserError(
            f"adapter {repository!r} is gated: accept its terms on https://huggingface.co/{repository} and run "
            "`hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"adapter {repository!r} is neither a folder here nor on the Hub, unless it is private: check the name, or "
            "run `hf auth login`"
        ) from error
    except (HubUnreachable, OSError) as error:
        raise HubUnreachable(
            f"adapter {repository!r} is no folder here, and the Hugging Face Hub cannot be reached to look for it; "
            "give a run's folder or an adapter's, or go online once"
        ) from error
    if lacking := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        raise UserError(
            f"adapter {repository!r} has no {lacking[0]} on the Hub, so it is no adapter of peft's that is read "
            "without unpickling; give another one"
        )
    return folder


def _check_reachable(model: str) -> None:
    """Ask the Hub once: hf_hub_download itself would retry for half a minute without a network."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception as error:  # the HTTP library under huggingface_hub, and so its errors, changes between releases
        raise _unreachable(model) from error


def _unreachable(model: str) -> HubUnreachable:
    return HubUnreachable(
        f"model {model!r}: the Hugging Face Hub cannot be reached and the model is not in its cache; go online once, "
        f"or give model=LOCAL_FOLDER{_known(model)}"
    )


def _known(model: str) -> str:
    """Return a hint at the models that need no network: the one with the closest name, or their series."""
    from lowmem_rlhf.architecture import catalogue

    near = did_you_mean(model, catalogue.entries())
    return near or f"; no network is needed for {', '.join(catalogue.series())}"
