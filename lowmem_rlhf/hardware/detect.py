"""Find the device a run will use: ask the NVIDIA driver, then torch, then take the CPU.

torch takes seconds to import, so it is asked only when it is imported already, when the user names a device that NVML
does not know, or when something hints at an accelerator that NVML does not know (``_torch_may_know``).
"""

import importlib.metadata
import os
import re
import sys

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import kind_of, torch_is_for_rocm
from lowmem_rlhf.hardware.cpu_device import cpu_device, ram
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.nvml import Card, Inventory, NvmlUnavailable, order_is_uncertain, read_nvml, visible_cards
from lowmem_rlhf.hardware.speed import Speed, speed_of_clocks
from lowmem_rlhf.hardware.torch_device import from_torch, torch_has
from lowmem_rlhf.processes.start import local_rank
from lowmem_rlhf.suggest import did_you_mean

GIB = 1024**3
# AMD's ROCm, NVIDIA in a container without NVML, NVIDIA's Jetson.
_ACCELERATOR_FILES = ("/dev/kfd", "/dev/nvidiactl", "/dev/nvmap")


def pin_cuda_order() -> None:
    """Make CUDA number the cards as NVML does, unless the user has chosen an order.

    Sets ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` for this process and its children. The command line calls it at start-up,
    before torch is imported; it has no effect once CUDA is initialised.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def detect(device: str = "auto") -> Device:
    """Return the device to run on, with its memory as it is now.

    Args:
        device: ``auto`` (the visible NVIDIA card with the most free memory, else what torch has, else the CPU),
            ``cpu``, ``cuda`` (the card with the most free memory), ``cuda:1``, or any other torch device string.
            Without a number each of several processes takes the card of its ``LOCAL_RANK``.

    Raises:
        UserError: no such device.
    """
    kind, index = parse_device(device)
    index = local_rank() if index is None else index
    if kind == "cpu":
        return cpu_device()
    if kind not in ("auto", "cuda"):
        return from_torch(kind, index)
    notes: tuple[str, ...] = ()
    try:
        inventory = read_nvml()
    except NvmlUnavailable as error:
        inventory = Inventory(None, ())
        if not error.library_missing:
            notes = (f"the NVIDIA driver cannot be asked ({error}); `nvidia-smi` tells more",)
    if inventory.cards and not torch_is_for_rocm():  # which calls AMD's cards cuda and knows no other
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = visible_cards(inventory.cards, visible)
        if cards:
            return _choose(inventory, cards, index)
        hidden = _why_hidden(inventory.cards, visible)
        if kind == "cuda":
            raise UserError(f"device {device!r} was asked for, but {hidden}")
        return cpu_device((hidden,))
    if kind == "cuda":
        return from_torch("cuda", index, notes)
    if _torch_may_know():
        for kind in ("cuda", "xpu", "mps"):
            if torch_has(kind):
                return from_torch(kind, index, notes)
    return cpu_device(notes)


def first_cards(device: str, number: int) -> list[str]:
    """Return the names of this machine's first NVIDIA or AMD cards; none where it has fewer, or others were asked for.

    Args:
        device: as for `detect`.
        number: of them.

    Raises:
        UserError: no such device.
    """
    kind, index = parse_device(device)
    if index is not None or kind not in ("auto", "cuda") or detect(device).kind != "cuda":
        return []
    try:
        return [detect(f"cuda:{place}").torch_device for place in range(number)]
    except UserError:  # this machine has fewer
        return []


def parse_device(device: str) -> tuple[str, int | None]:
    """Return the kind and the number in a device string, as in ``cuda:1``; None for no number.

    Raises:
        UserError: it is no device string.
    """
    match = re.fullmatch(r"([a-z][a-z0-9_]*)(?::(\d+))?", device.strip().lower())
    if not match or (match[1] == "auto" and match[2]):
        known = ("auto", "cpu", "cuda", "cuda:0", "xpu", "mps")
        raise UserError(
            f"device {device!r} is not a device; write auto, cpu, cuda, cuda:N or another torch device string"
            f"{did_you_mean(device, known)}"
        )
    return match[1], int(match[2]) if match[2] else None


def _choose(inventory: Inventory, cards: list[Card], index: int | None) -> Device:
    """Return card ``index`` of the visible ones; without a number the one with the most free memory."""
    if index is not None and index >= len(cards):
        there = "; ".join(f"cuda:{number} is {card.name}" for number, card in enumerate(cards))
        raise UserError(f"device 'cuda:{index}' does not exist: {there}; choose one of these or `auto`")
    free = [_memory(card)[1] for card in cards]
    chosen = max(range(len(cards)), key=lambda number: free[number]) if index is None else index
    card = cards[chosen]
    total_bytes, free_bytes = _memory(card)
    notes = []
    if index is None and len(cards) > 1:
        others = ", ".join(
            f"cuda:{number} {other.name} with {free[number] / GIB:.1f} GiB"
            for number, other in enumerate(cards)
            if number != chosen
        )
        notes.append(
            f"took cuda:{chosen}, {card.name}: of {len(cards)} cards it has the most free memory "
            f"({free_bytes / GIB:.1f} GiB); the others: {others}"
        )
    if card.total_bytes is None:
        notes.append("the driver tells no memory of this card; it is taken to share the system's RAM")
    notes.extend(_notes(inventory, card))
    known = card.used_bytes is not None and card.display_bytes is not None
    return Device(
        torch_device=f"cuda:{chosen}",
        name=card.name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        compute_capability=card.compute_capability,
        bf16=card.compute_capability is not None and card.compute_capability >= (8, 0),
        driver=inventory.driver,
        display_bytes=card.display_bytes,
        other_bytes=max(0, card.used_bytes - card.display_bytes) if known else None,  # type: ignore[operator]
        processes=card.processes,
        source="nvml",
        notes=tuple(notes),
        speed=_speed(card),
        backend="cuda",
    )


def _speed(card: Card) -> Speed | None:
    """Return what the driver tells of a card's speed; of an instance's part of a card it tells nothing."""
    told = (card.compute_capability, card.cores, card.clock_mhz, card.memory_clock_mhz, card.bus_bits)
    return None if card.is_mig or not all(told) else speed_of_clocks(card.name, *told)  # type: ignore[arg-type]


def _memory(card: Card) -> tuple[int, int]:
    """Return total and free bytes; a card without memory of its own (NVML tells none) shares the RAM."""
    if card.total_bytes is None or card.free_bytes is None:
        return ram()
    return card.total_bytes, card.free_bytes


def _notes(inventory: Inventory, card: Card) -> list[str]:
    notes = []
    visible, order = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")
    if order_is_uncertain(inventory.cards, visible, order):
        notes.append(
            f"cards of different kinds are numbered by the PCI bus here, and CUDA_DEVICE_ORDER is "
            f"{order or 'not set'}: CUDA may number them otherwise; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    instances = sum(len(other.instances) for other in inventory.cards)
    if card.is_mig and instances > 1:
        notes.append(
            f"this is one of {instances} MIG instances; CUDA gives a process one, choose it with "
            f"CUDA_VISIBLE_DEVICES=MIG-..."
        )
    version = _torch_version()
    if version.endswith("+cpu"):
        notes.append(f"the installed torch ({version}) has no CUDA and cannot use this card; install a build that has")
    return notes


def _why_hidden(cards: tuple[Card, ...], visible: str | None) -> str:
    names = ", ".join(card.name for card in cards)
    if visible is None:
        return f"{names}: in MIG mode without an instance; create one with nvidia-smi, or leave MIG mode"
    return f"CUDA_VISIBLE_DEVICES={visible!r} hides every NVIDIA card ({names}); unset it to use one"


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch_may_know() -> bool:
    """Tell cheaply whether torch may have an accelerator that NVML does not know."""
    return (
        "torch" in sys.modules
        or sys.platform == "darwin"
        or re.search(r"\+(xpu|rocm)", _torch_version()) is not None
        or any(os.path.exists(path) for path in _ACCELERATOR_FILES)
    )


def torch_reaches(device: str) -> bool:
    """Tell whether this torch can use a device that `detect` found: NVML knows cards that a CPU build cannot reach."""
    kind = kind_of(device)
    return kind != "cuda" or torch_has(kind)


def describe(device: Device) -> list[str]:
    """Return the lines that ``lowmem-rlhf detect`` prints."""
    lines = [f"{device.name} ({device.torch_device})"]
    facts = []
    if device.compute_capability:
        facts.append("compute capability {}.{}".format(*device.compute_capability))
    facts.append("bfloat16" if device.bf16 else "float16 (no bfloat16)")
    if device.driver:
        facts.append(f"driver {device.driver}")
    lines.append(", ".join(facts))
    lines.append(f"memory: {device.free_bytes / GIB:.2f} GiB free of {device.total_bytes / GIB:.2f} GiB")
    if device.display_bytes is not None and device.other_bytes is not None:
        lines.append(
            f"in use: {device.display_bytes / GIB:.2f} GiB by the display, "
            f"{device.other_bytes / GIB:.2f} GiB by other processes and the driver"
        )
    for process in device.processes:
        held = "unknown" if process["bytes"] is None else f"{process['bytes'] / 1024**2:.0f} MiB"
        lines.append(f"  {process['kind']} process {process['pid']} ({process['name'] or 'name unknown'}): {held}")
    return lines + [f"note: {note}" for note in device.notes]
