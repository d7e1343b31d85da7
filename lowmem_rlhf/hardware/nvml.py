"""What the NVIDIA driver says about its cards (NVML), and which of them CUDA shows under which number.

NVML needs no CUDA context and no torch. It counts the cards in the order of the PCI bus; CUDA does so only with
``CUDA_DEVICE_ORDER=PCI_BUS_ID`` (see ``detect.pin_cuda_order``), its own default being the fastest card first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil


class NvmlUnavailable(Exception):
    """NVML cannot be asked. ``library_missing`` tells "no driver installed" from "the driver does not work"."""

    def __init__(self, message: str, library_missing: bool):
        super().__init__(message)
        self.library_missing = library_missing


@dataclass(frozen=True)
class Card:
    """A card, or one MIG instance of a card; None where the driver does not tell.

    Attributes:
        index: the card's number in NVML, which is the order of the PCI bus (an instance has its card's).
        used_bytes: memory in use, the driver's own share included.
        display_bytes: the sum of what graphics processes hold.
        processes: as in ``Device.processes``.
        cores: that compute in fp32.
        clock_mhz, memory_clock_mhz: the highest clocks of cores and memory.
        bus_bits: width of the memory bus.
        mig_mode: the card is divided, and CUDA offers its instances only.
        instances: the MIG instances of a card in that mode.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    used_bytes: int | None
    compute_capability: tuple[int, int] | None
    display_bytes: int | None = None
    processes: tuple[dict[str, Any], ...] = ()
    cores: int | None = None
    clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    bus_bits: int | None = None
    is_mig: bool = False
    mig_mode: bool = False
    instances: tuple["Card", ...] = ()


@dataclass(frozen=True)
class Inventory:
    """The driver's version and its cards in NVML's order."""

    driver: str | None
    cards: tuple[Card, ...]


def read_nvml() -> Inventory:
    """Read every card. A question the driver does not support is answered with None; NVML is always shut down again.

    Raises:
        NvmlUnavailable: the library is missing, the driver is not loaded or does not fit the library, ...
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        missing = isinstance(error, pynvml.NVMLError_LibraryNotFound)
        raise NvmlUnavailable(str(error), library_missing=missing) from error
    try:
        count = ask(pynvml.nvmlDeviceGetCount) or 0
        cards = [_read_card(index) for index in range(count)]
        return Inventory(ask(pynvml.nvmlSystemGetDriverVersion), tuple(card for card in cards if card))
    finally:
        ask(pynvml.nvmlShutdown)


def ask(function: Callable[..., Any], *args: Any) -> Any:
    """Return NVML's answer, or None where driver or card have none."""
    import pynvml

    try:
        return function(*args)
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, UnicodeDecodeError):
        return None


def _read_card(index: int) -> Card | None:
    """Read one card, or return None for one that has fallen off the bus or is not ours to open."""
    import pynvml

    handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:
        return None
    mode = ask(pynvml.nvmlDeviceGetMigMode, handle)
    mig_mode = bool(mode and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    card = _read_handle(index, handle, mig_mode=mig_mode)
    if not mig_mode:
        return card
    instances = []
    for number in range(ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        instance = ask(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if instance is not None:
            instances.append(_read_handle(index, instance, of=card))
    return Card(**{**card.__dict__, "instances": tuple(instances)})


def _read_handle(index: int, handle: Any, mig_mode: bool = False, of: Card | None = None) -> Card:
    import pynvml

    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    processes, display = _processes(handle)
    return Card(
        index=index,
        uuid=ask(pynvml.nvmlDeviceGetUUID, handle) or "",
        name=ask(pynvml.nvmlDeviceGetName, handle) or (f"{of.name} MIG" if of else "NVIDIA card of unknown name"),
        total_bytes=int(memory.total) if memory else None,
        free_bytes=int(memory.free) if memory else None,
        used_bytes=int(memory.used) if memory else None,
        compute_capability=tuple(capability) if capability else (of.compute_capability if of else None),  # type: ignore[arg-type]
        display_bytes=display,
        processes=processes,
        cores=ask(pynvml.nvmlDeviceGetNumGpuCores, handle),
        clock_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
        memory_clock_mhz=ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        bus_bits=ask(pynvml.nvmlDeviceGetMemoryBusWidth, handle),
        is_mig=of is not None,
        mig_mode=mig_mode,
    )


def _processes(handle: Any) -> tuple[tuple[dict[str, Any], ...], int | None]:
    """Return the processes that hold memory and the display's share of it in bytes (None: not told).

    A process that NVML lists as both compute and graphics holds its memory once; it counts as the display's.
    """
    import pynvml

    found: dict[int, dict[str, Any]] = {}
    listed: dict[str, Any] = {}
    for kind in ("Compute", "Graphics"):
        for version in ("_v3", "_v2"):  # drivers before release 510 have the older one
            listed[kind] = ask(getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses{version}"), handle)
            if listed[kind] is not None:
                break
        for process in listed[kind] or ():
            held = process.usedGpuMemory
            found[process.pid] = {
                "pid": int(process.pid),
                "name": _process_name(process.pid),
                "kind": kind.lower(),
                "bytes": int(held) if held is not None else None,
            }
    graphics = [process["bytes"] for process in found.values() if process["kind"] == "graphics"]
    known = [held for held in graphics if held is not None]
    told = listed["Graphics"] is not None and (bool(known) or not graphics)
    return tuple(found.values()), sum(known) if told else None


def _process_name(pid: int) -> str | None:
    import pynvml

    name = ask(pynvml.nvmlSystemGetProcessName, pid)
    if name:
        return str(name)
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None  # of another container, or gone


def visible_cards(cards: tuple[Card, ...], visible: str | None) -> list[Card]:
    """Return the cards in CUDA's numbering, given ``CUDA_VISIBLE_DEVICES`` (None: not set).

    As CUDA does it: entries are numbers or (the beginning of) UUIDs, the first invalid entry ends the list, a repeated
    one empties it, and a process gets a single MIG instance, next to which whole cards are not offered.
    """
    listed = list(cards) if visible is None else _listed(cards, visible)
    offered: list[Card] = []
    for card in listed:
        offered.extend(card.instances if card.mig_mode else (card,))
    instances = [card for card in offered if card.is_mig]
    return instances[:1] or offered


def _listed(cards: tuple[Card, ...], visible: str) -> list[Card]:
    chosen: list[Card] = []
    for entry in visible.split(","):
        card = _entry(cards, entry.strip())
        if card is None:
            break
        if card in chosen:
            return []
        chosen.append(card)
    return chosen


def _entry(cards: tuple[Card, ...], entry: str) -> Card | None:
    if entry.startswith(("GPU-", "MIG-")):
        units = [*cards, *(instance for card in cards for instance in card.instances)]
        matching = [unit for unit in units if unit.uuid.startswith(entry)]
        return matching[0] if len(matching) == 1 else None
    number = re.match(r"\+?(\d+)", entry)  # CUDA reads the leading digits, like strtoul
    return next((card for card in cards if number and card.index == int(number[1])), None)


def order_is_uncertain(cards: tuple[Card, ...], visible: str | None, cuda_order: str | None) -> bool:
    """Tell whether CUDA may number cards of different kinds otherwise than NVML does."""
    different = len({(card.name, card.total_bytes) for card in cards}) > 1
    by_number = visible is None or not visible.strip().startswith(("GPU-", "MIG-"))
    return different and by_number and cuda_order != "PCI_BUS_ID"
