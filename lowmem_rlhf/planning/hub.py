"""Fetching a model's config.json: from the Hugging Face cache when it is there, otherwise from the Hub."""

from pathlib import Path

from lowmem_rlhf.errors import UserError

_TIMEOUT_S = 5.0


def fetch_config(model: str, revision: str | None) -> Path:
    """Return the local copy of a Hub model's config.json.

    Raises:
        UserError: no such model or revision, no access to it, or the Hub cannot be reached and nothing is cached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise UserError(f"model {model!r} is no Hub id: {error}") from error
    _check_reachable(model)
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision, etag_timeout=_TIMEOUT_S))
    except GatedRepoError as error:
        raise UserError(
            f"model {model!r} is gated: accept its terms on https://huggingface.co/{model} and run `hf auth login`, "
            "or give model=LOCAL_FOLDER"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model {model!r} is not on the Hub, or is private: check the name, run `hf auth login`, "
            "or give model=LOCAL_FOLDER"
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


def _check_reachable(model: str) -> None:
    """Ask the Hub once: hf_hub_download itself would retry for half a minute without a network."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception as error:  # the HTTP library under huggingface_hub, and so its errors, changes between releases
        raise _unreachable(model) from error


def _unreachable(model: str) -> UserError:
    return UserError(
        f"model {model!r}: the Hugging Face Hub cannot be reached and the model is not in its cache; go online once, "
        "or give model=LOCAL_FOLDER"
    )
