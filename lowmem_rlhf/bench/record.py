"""The record of a run of ``bench``: what was measured, with what, and nothing about whose machine it is. No torch here.

A record is one JSON object: ``schema``, ``kind`` (``bench``), ``date`` (UTC), ``device`` (as ``detect --json`` tells,
without processes, and the load before), ``versions``, ``package``, ``commit`` (None where the package is installed from
a wheel), ``model``, ``work`` (`bench.work.Sizes`), ``minutes`` that were asked for, ``seconds`` that it took, and
``parts``: by name ``title``, ``status`` (``done``, ``skipped`` or ``failed``), ``seconds``, ``reason`` and ``values``.
"""

import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowmem_rlhf import __version__
from lowmem_rlhf.bench.checkout import commit
from lowmem_rlhf.bench.work import Work
from lowmem_rlhf.files import atomic_write, dumps, writing
from lowmem_rlhf.hardware.device import Device

SCHEMA = 1
LIBRARIES = ("torch", "bitsandbytes", "transformers", "trl", "peft", "accelerate")
PRIVATE = ("processes", "compiler", "notes")  # of a device: names, folders, what else is in the machine
_PATH = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:|~)?(?:[\\/][^\s'\"\\/:,;()<>|]+)+[\\/]?")

Record = dict[str, Any]


def new_record(device: Device, work: Work, minutes: float) -> Record:
    """Return the record of a run that begins now, without parts."""
    facts = {key: value for key, value in device.to_dict().items() if key not in PRIVATE}
    return {
        "schema": SCHEMA,
        "kind": "bench",
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": {**facts, "cores": os.cpu_count(), "system": platform.system(), "load": _load()},
        "versions": {"python": platform.python_version(), **_versions(LIBRARIES)},
        "package": __version__,
        "commit": commit(),
        "model": {"name": _model_name(work.model), "weights": None, "compute_dtype": work.compute_dtype},
        "work": asdict(work.sizes),
        "minutes": minutes,
        "seconds": 0.0,
        "parts": {},
    }


def _load() -> float | None:
    """Return how many processes wanted a core in the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _versions(names: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _model_name(model: str) -> str:
    """Return a model's name without the folder that it lies in."""
    return Path(model).name if Path(model).exists() else model


def publishable(value: Any) -> Any:
    """Return a value as a record holds it: numbers of six digits, and texts that name no folder and no machine.

    Of a path its last part stays.
    """
    if isinstance(value, dict):
        return {publishable(key): publishable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [publishable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if not isinstance(value, str):
        return value
    text = _PATH.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], value)
    host = platform.node()
    return re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "this machine", text) if len(host) > 3 else text


def save(record: Record, path: Path) -> None:
    """Write a record whole, without what is private.

    Raises:
        RunError: the disk refuses.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, dumps(publishable(record), indent=1) + "\n")


def file_name(device: Device, folder: Path) -> Path:
    """Return a name in the folder that no file has: ``bench-CARD-DATE.json``."""
    card = re.sub(r"[^a-z0-9]+", "-", device.name.lower().replace("nvidia", "")).strip("-") or device.kind
    stem = f"bench-{card}-{datetime.now(UTC):%Y-%m-%d}"
    names = (folder / f"{stem}{'' if number == 1 else f'-{number}'}.json" for number in range(1, 10_000))
    return next(path for path in names if not path.exists())
