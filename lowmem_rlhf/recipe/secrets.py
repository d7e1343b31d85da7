"""Tokens and passwords that were written into a recipe, which run directories and cards would show. No torch here."""

import os
import re
from typing import Any

# of the Hub, Weights & Biases, OpenAI and the like, GitHub, AWS
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16})\b"
)
_ADDRESS = re.compile(r"\b[A-Za-z][\w+.-]*://[^\s/@\x22'<>]+@")  # https://user:password@host
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TRACKIO_TOKEN", "MLFLOW_TRACKING_PASSWORD")
_LEAST = 8  # characters of a secret; a shorter one would be found in ordinary texts


def masked(text: str) -> str:
    """Return a text with what looks like a secret replaced, for files that leave this machine."""
    text = _ADDRESS.sub(lambda match: match[0].partition("://")[0] + "://***@", _TOKEN.sub("***", text))
    for value in _secrets().values():
        text = text.replace(value, "***")
    return text


def masked_values(values: Any) -> Any:
    """Return the values of a recipe with `masked` texts."""
    if isinstance(values, dict):
        return {key: masked_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [masked_values(value) for value in values]
    return masked(values) if isinstance(values, str) else values


def _secrets() -> dict[str, str]:
    """Return by environment variable the secrets that this process has."""
    values = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    return {name: value for name, value in values.items() if len(value) >= _LEAST}


def why_secret(text: str) -> str:
    """Return why a text should not stand in a recipe, without the secret in it; empty where there is none."""
    found = ""
    if match := _TOKEN.search(text):
        found = f"what looks like an access token ({match[0][:3]}...)"
    elif _ADDRESS.search(text):
        found = "an address with a user name or password in it"
    else:
        found = next((f"the value of ${name}" for name, value in _secrets().items() if value in text), "")
    if not found:
        return ""
    return (
        f"holds {found}; a recipe is kept in its run and shown in model cards, so take it out (the Hub's token is read "
        "from $HF_TOKEN or from `hf auth login`)"
    )
