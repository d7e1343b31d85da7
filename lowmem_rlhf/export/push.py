"""Uploading an export to the Hugging Face Hub, with huggingface_hub."""

import os
from pathlib import Path

from lowmem_rlhf import __version__
from lowmem_rlhf.errors import LowmemError, RunError, UserError, one_line

_LOGIN = "run `hf auth login`, or set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"


def check_push(repo: str) -> None:
    """Check what can be checked before an export is made: the name, a token, and that the Hub may be asked.

    Raises:
        UserError: one of them is missing.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"--push {repo}: this names no repository of the Hub ({_first(error)}); give OWNER/NAME, or NAME for "
            "your own account"
        ) from error
    if constants.is_offline_mode():
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set, so the Hub is never asked; unset it to push")
    if get_token() is None:
        raise UserError(f"--push {repo}: there is no token for the Hub; {_LOGIN}")


def push(folder: Path, repo: str, private: bool = True, message: str = "") -> str:
    """Upload every file of an export to a repository, which is created if it does not exist; return its address.

    Args:
        folder: the finished export.
        repo: ``OWNER/NAME``, or ``NAME`` for the token's own account.
        private: whether a new repository is private; an existing one stays as it is.
        message: of the commit.

    Raises:
        UserError: no such folder, or what `check_push` checks; or the Hub refuses the token or the name.
        RunError: the Hub cannot be reached, or fails. The export stays as it is, and what arrived is not sent again.
    """
    from huggingface_hub import HfApi

    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"--push {repo}: there is no export in {folder}")
    check_push(repo)
    api = HfApi(library_name="lowmem_rlhf", library_version=__version__)
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            commit_message=message or f"Upload an export of lowmem_rlhf {__version__}",
        )
    except Exception as error:
        raise _explained(error, folder, repo) from error
    return str(created)


def _explained(error: BaseException, folder: Path, repo: str) -> LowmemError:
    """Return the error that says what happened and what to do.

    Raises:
        BaseException: the error itself, where it is none of the Hub's or of the network.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    again = f"the export in {folder} is whole; `hf upload {repo} {os.fspath(folder)}` sends it later"
    if refusal := next((one for one in chain if isinstance(one, HfHubHTTPError)), None):
        return _refused(refusal, repo, again)
    if any(_is_network(one) for one in chain):
        return RunError(f"--push {repo}: {constants.ENDPOINT} cannot be reached ({_first(chain[-1])}); {again}")
    if isinstance(error, ValueError):  # what the Hub answered that is no refusal, such as metadata it does not take
        return RunError(f"--push {repo}: {_first(error)}; {again}")
    raise error


def _refused(error: BaseException, repo: str, again: str) -> LowmemError:
    response = getattr(error, "response", None)
    status, reason = getattr(response, "status_code", None), getattr(error, "server_message", None) or _first(error)
    if status == 401:
        return UserError(f"--push {repo}: the Hub does not know the token ({reason}); {_LOGIN}")
    if status == 403:
        return UserError(
            f"--push {repo}: the token may not write there ({reason}); take a repository of your own account, or a "
            "token with write access to that one"
        )
    if status in (400, 404, 409, 422):
        return UserError(f"--push {repo}: the Hub refuses it ({status}: {reason}); give another OWNER/NAME")
    return RunError(f"--push {repo}: the Hub failed ({status}: {reason}); {again}")


def _is_network(error: BaseException) -> bool:
    """Whether the connection failed. The error's type depends on huggingface_hub's HTTP client, which varies."""
    kind = type(error)
    client = kind.__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    return client or isinstance(error, (ConnectionError, TimeoutError))


def _first(error: BaseException) -> str:
    text = one_line(error)
    return text.split(". ")[0].rstrip(".:")[:300]
