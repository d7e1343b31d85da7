"""What is asked of the machine: each fact once, when a check first needs it. No torch here."""

import http.client
import importlib.metadata
import os
import platform
import shutil
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from lowmem_rlhf.doctor import probe
from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.hardware.cpu_device import cpu_device
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.nvml import Inventory, NvmlUnavailable, read_nvml
from lowmem_rlhf.paths import cannot_be_written

MAKERS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
PCI = Path("/sys/bus/pci/devices")
SHARED_MEMORY = Path("/dev/shm")
HUB_SECONDS = 4.0
PUBLIC_HUBS = ("huggingface.co", "hf.co")
SMALL_FILE = "/Qwen/Qwen2.5-0.5B-Instruct/resolve/main/config.json"  # what a run asks for first, of a public model
_CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")


@dataclass(frozen=True)
class Disk:
    """A place that runs write to: ``what`` it holds, its ``path``, free bytes, and why it cannot be written (empty)."""

    what: str
    path: Path
    free_bytes: int
    obstacle: str = ""


@dataclass(frozen=True)
class Hub:
    """What the Hub answered: ``code`` of HTTP, or why there was none; ``offline``: the setting that forbids to ask."""

    host: str
    offline: str = ""
    code: int | None = None
    error: str = ""


class Machine:
    """This machine. Tests put other answers in the place of the properties.

    Attributes:
        asked: the device that was asked for, as of ``detect``.
    """

    def __init__(self, asked: str = "auto") -> None:
        self.asked = asked

    @cached_property
    def python(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    @cached_property
    def system(self) -> str:
        """``Linux``, ``Windows`` or ``Darwin``."""
        return platform.system()

    @cached_property
    def is_wsl(self) -> bool:
        """Whether this is Linux inside Windows."""
        return "microsoft" in platform.release().lower()

    @cached_property
    def distribution(self) -> str:
        """Linux's, as it calls itself: ``ubuntu``; empty where it does not tell."""
        try:
            return platform.freedesktop_os_release().get("ID", "")
        except OSError:
            return ""

    @cached_property
    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    @cached_property
    def _found(self) -> tuple[Device, str]:
        try:
            return detect(self.asked), ""
        except UserError as error:
            return cpu_device(), str(error)
        except (ImportError, OSError, RuntimeError) as error:  # torch, which is asked for what NVML does not know
            return cpu_device(), f"torch cannot be asked for it: {one_line(error)}"

    @cached_property
    def device(self) -> Device:
        """What a run would use; the CPU where what was asked for is not there."""
        return self._found[0]

    @cached_property
    def device_problem(self) -> str:
        """Why what was asked for is not there; empty where it is."""
        return self._found[1]

    @cached_property
    def _nvml(self) -> tuple[Inventory | None, str]:
        try:
            return read_nvml(), ""
        except NvmlUnavailable as error:
            return None, "" if error.library_missing else str(error)

    @cached_property
    def inventory(self) -> Inventory | None:
        """NVIDIA's cards as the driver lists them; None where it cannot be asked."""
        return self._nvml[0]

    @cached_property
    def driver_problem(self) -> str:
        """What NVIDIA's driver says of itself where it does not work; empty where it works or is not installed."""
        return self._nvml[1]

    @cached_property
    def makers(self) -> tuple[str, ...]:
        """The makers of the graphics cards on the PCI bus, which Linux lists whether or not there is a driver."""
        found = []
        for folder in sorted(PCI.glob("*")) if PCI.is_dir() else []:
            try:
                kind, maker = (folder / "class").read_text().strip(), (folder / "vendor").read_text().strip()
            except OSError:
                continue
            if kind.startswith("0x03") and maker in MAKERS:
                found.append(MAKERS[maker])
        return tuple(found)

    @cached_property
    def probed(self) -> dict[str, Any]:
        """What `probe` says: ``torch`` and ``bitsandbytes``."""
        return probe.ask(self.device.torch_device, self.device.half_dtype)

    @cached_property
    def torch(self) -> dict[str, Any]:
        return dict(self.probed["torch"])

    @cached_property
    def four_bit(self) -> dict[str, Any]:
        return dict(self.probed["bitsandbytes"])

    def version(self, package: str) -> str | None:
        """Return the installed version of a package."""
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    @cached_property
    def disks(self) -> tuple[Disk, ...]:
        """Where models are kept, and where runs are."""
        from huggingface_hub import constants

        return (_disk("the cache of models", Path(constants.HF_HUB_CACHE)), _disk("runs", Path("runs")))

    @cached_property
    def cached_models(self) -> int:
        """How many models the cache holds, wholly or in part."""
        return sum(1 for _ in self.disks[0].path.glob("models--*"))

    @cached_property
    def hub(self) -> Hub:
        from huggingface_hub import constants

        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or ""
        if not host.endswith(PUBLIC_HUBS):
            host = "the Hub that HF_ENDPOINT names"  # an address of one's own is nobody else's business
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            if self.environment.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
                return Hub(host, offline=name)
        return ask_hub(constants.ENDPOINT.rstrip("/") + SMALL_FILE, host)

    @cached_property
    def has_token(self) -> bool:
        """Whether the Hub's library finds a token; the token itself is not kept."""
        from huggingface_hub import get_token

        return bool(get_token())

    @cached_property
    def in_container(self) -> bool:
        return any(map(os.path.exists, _CONTAINER_FILES)) or "container" in self.environment

    @cached_property
    def shared_memory(self) -> int | None:
        """The size of /dev/shm in bytes; None where there is none."""
        return shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None

    @cached_property
    def ram_bytes(self) -> int:
        return int(psutil.virtual_memory().total)


def _disk(what: str, path: Path) -> Disk:
    """Return a place's free bytes: of the folder, or of the one above it in which it would be made."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    return Disk(what, path, shutil.disk_usage(there).free, cannot_be_written(path))


def ask_hub(address: str, host: str) -> Hub:
    """Return what the Hub answers within `HUB_SECONDS`; finding its address may take a system much longer."""
    answer = Hub(host, error=f"no answer within {HUB_SECONDS:.0f} seconds")

    def ask() -> None:
        nonlocal answer
        try:
            request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "lowmem-rlhf doctor"})
            with urllib.request.urlopen(request, timeout=HUB_SECONDS) as response:
                answer = Hub(host, code=response.status)
        except urllib.error.HTTPError as error:
            answer = Hub(host, code=error.code)
        except OSError as error:
            answer = Hub(host, error=str(getattr(error, "reason", error)))
        except (ValueError, http.client.HTTPException) as error:  # its text may hold the address with its password
            answer = Hub(host, error=type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 1)
    return answer
