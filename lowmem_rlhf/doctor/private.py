"""What a report that is sent to others must not hold: folders, users, machines, other programs, tokens, addresses."""

import getpass
import re
from collections.abc import Mapping
from typing import Any

from lowmem_rlhf.bench.record import publishable

# Settings that change what a run computes or which card it takes; their values are told where they are plain words.
TOLD = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"),
    *("HSA_OVERRIDE_GFX_VERSION", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK"),
    *("BNB_CUDA_VERSION", "BNB_ROCM_VERSION", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TORCHDYNAMO_DISABLE"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LOWMEM_RLHF_NATIVE"),
)
# Of these only that they are set.
NAMED = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_DATASETS_CACHE", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("PYTHONPATH", "CONDA_PREFIX", "VIRTUAL_ENV", "HTTP_PROXY", "HTTPS_PROXY", "SSL_CERT_FILE", "WSL_DISTRO_NAME"),
)
_PLAIN = re.compile(r"[\w.,:+-]{0,64}")
_UUID = re.compile(r"\b(GPU|MIG)-[0-9a-fA-F][0-9a-fA-F-]*")
_TOKEN = re.compile(r"\b(?:hf|sk|ghp|gho|github_pat|xox[bp])[_-][A-Za-z0-9_-]{8,}")
_LOGIN = re.compile(r"://[^\s/@]+@")
_KEPT = re.compile(r"(/dev/shm|runs/\*)")  # that every machine has
_PROGRAM = re.compile(r"\bprocess (\d+) \([^)]*\)")
_NUMBERS = ("uuid",)  # keys of what names one card among all
_ANYBODY = ("root", "user", "runner", "jovyan")


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that matter: the value where it is a plain word and no secret, else ``set``."""
    told = {name: given[name] if _PLAIN.fullmatch(given[name]) else "set" for name in TOLD if name in given}
    return told | {name: "set" for name in NAMED if name in given}


def without_secrets(value: Any) -> Any:
    """Return a value of a report that names no folder, machine, user, program, token or card's number."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items() if key not in _NUMBERS}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return publishable(value)
    text = _PROGRAM.sub(r"process \1", _TOKEN.sub("TOKEN", _LOGIN.sub("://", _UUID.sub(r"\1-...", value))))
    user = _user()
    if user:
        text = re.sub(rf"(?<![\w.-]){re.escape(user)}(?![\w-])", "USER", text)
    return "".join(part if _KEPT.fullmatch(part) else publishable(part) for part in _KEPT.split(text))


def _user() -> str:
    """Return this user's name; empty where it is one that says nothing, or too short to be looked for."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a number without a name
        return ""
    return name if len(name) > 2 and name.lower() not in _ANYBODY else ""
