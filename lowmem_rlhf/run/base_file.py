"""What an adapter records about the model that it was trained on: its fingerprint and its name. No torch here."""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

BASE = "base.json"  # beside an adapter; peft does not read it
# endings of checkpoints that are quantized already; the same name without them is the 16-bit model
_QUANTIZED = re.compile(
    r"((-unsloth)?-bnb-[48]bit|[-_.]([48]bit|int[48]|gptq|awq|fp8|nf4|hqq|exl2|w4a16|w8a8|gguf))"
    r"([-_.](int[48]|[48]bit|g\d+|quantized))*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Fingerprint:
    """Hashes (SHA-256, hexadecimal) of a model's parts.

    Attributes:
        kind: of its files, ``safetensors`` or ``gguf``; only models of one kind can be compared.
        weights: names, shapes, dtypes and sampled bytes of its tensors; of a GGUF its size and sampled bytes.
        config: of config.json, without what a library writes about itself; None of a GGUF.
        tokenizer: of its vocabulary, its chat template and the tokens that begin and end a text; None of a GGUF, or
            where there is none.
        commit: of the Hub's snapshot that the files lie in, where they do.
    """

    kind: str
    weights: str
    config: str | None = None
    tokenizer: str | None = None
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the parts that there are."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def differing(self, other: "Fingerprint") -> list[str]:
        """Return which of weights, config and tokenizer both have and are not the same; nothing for other kinds."""
        if self.kind != other.kind:
            return []
        both = ((name, getattr(self, name), getattr(other, name)) for name in ("weights", "config", "tokenizer"))
        return [name for name, mine, its in both if mine and its and mine != its]


def read_fingerprint(values: Any) -> Fingerprint | None:
    """Return what `Fingerprint.to_dict` gave, among other keys; None where it is not that."""
    if not isinstance(values, dict):
        return None
    known = {field.name: values[field.name] for field in fields(Fingerprint) if values.get(field.name) is not None}
    if not {"kind", "weights"} <= known.keys() or not all(isinstance(value, str) for value in known.values()):
        return None
    return Fingerprint(**known)


def write_base(folder: Path, values: Any) -> None:
    """Write base.json beside every adapter below a folder: which base it was trained on, without this machine's paths.

    Args:
        folder: of a checkpoint or of adapters.
        values: the base's fingerprint and its name under ``model``; nothing is written where it is none.
    """
    fingerprint = read_fingerprint(values)
    if fingerprint is None:
        return
    model = str(values.get("model") or "")
    name = model if fingerprint.commit else re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    text = json.dumps({"model": name, **fingerprint.to_dict()}, indent=2) + "\n"
    for config in folder.rglob("adapter_config.json"):
        (config.parent / BASE).write_text(text, encoding="utf-8")


def read_base(folder: Path) -> tuple[str, Fingerprint] | None:
    """Return the name and the fingerprint of an adapter's base, where base.json beside it tells them."""
    try:
        values = json.loads((folder / BASE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fingerprint = read_fingerprint(values)
    return (str(values.get("model") or "another base"), fingerprint) if fingerprint else None


def full_precision(base: str) -> str:
    """Return the name of the 16-bit model that a quantized checkpoint was made of; other names as they are."""
    name = base.rstrip("/\\")
    owner, _, last = name.rpartition("/")
    short = _QUANTIZED.sub("", last)
    return f"{owner}/{short}" if owner and short else short or name
