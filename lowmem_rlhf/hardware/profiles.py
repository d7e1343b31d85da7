"""Known cards: what is a fact of the card and not of this machine's state. One file a card in ``profiles/``."""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities_of, never_run
from lowmem_rlhf.hardware.cpu_device import cpu_device
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.speed import Speed
from lowmem_rlhf.resources import shipped
from lowmem_rlhf.suggest import did_you_mean

MIB = 1024**2
GIB = 1024**3
_SAME_MEMORY = 0.08  # drivers report up to 7 % less than is sold (ECC, reserved); the closest variants differ by 17 %
_USABLE = 0.96  # of an unknown card's memory: the lowest share among the known cards, rounded down
_MAKERS = re.compile(r"^(NVIDIA|AMD|Intel(\(R\))?|Apple)\s+", re.IGNORECASE)
_DEVICES = {"cuda": "cuda:0", "rocm": "cuda:0", "xpu": "xpu:0", "mps": "mps", "cpu": "cpu"}
_MOST_MEMORY = 1024 * 1024 * GIB
_UNITS = {"M": MIB, "G": GIB, "T": 1024 * GIB}


class Profile(BaseModel):
    """A card.

    Attributes:
        key: the name to ask for, which is the file's.
        name: the name to read.
        memory_mib: the card's memory in MiB; None for the CPU, whose RAM is this machine's.
        usable_mib: what of it a process can have when nothing else uses the card.
        backend: what computes on it, as in `hardware.capabilities`.
        compute_capability: of a card of NVIDIA, ``"7.5"``; None where it has none or it is not known.
        architecture: what other makers call the chip, ``gfx1100``.
        bf16: whether bfloat16 is computed natively.
        bandwidth_gb_s, half_tflops, single_tflops, steady_half_tflops, steady_bandwidth_gb_s: see `Speed`; None where
            it is not known.
        match: regular expressions for the whole name that the driver gives, without the maker's.
        sources: where the numbers come from.
        reason: why this profile was taken for a device.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    name: str
    memory_mib: Annotated[int, Field(gt=0)] | None
    usable_mib: Annotated[int, Field(gt=0)] | None
    backend: Literal["cuda", "rocm", "xpu", "mps", "cpu"] = "cuda"
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")] | None = None
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] | None = None
    bf16: bool
    bandwidth_gb_s: Annotated[float, Field(gt=0)] | None
    half_tflops: Annotated[float, Field(gt=0)] | None
    single_tflops: Annotated[float, Field(gt=0)] | None
    steady_half_tflops: Annotated[float, Field(gt=0)] | None = None
    steady_bandwidth_gb_s: Annotated[float, Field(gt=0)] | None = None
    match: tuple[str, ...]
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    reason: str = ""

    @property
    def tried(self) -> bool:
        """Whether this package has run on devices of this backend."""
        return capabilities_of(self.backend).tried

    @property
    def speed(self) -> Speed | None:
        """What the card computes and moves in a second; None where that is not known."""
        if not (self.half_tflops and self.single_tflops and self.bandwidth_gb_s):
            return None
        steady = (self.steady_half_tflops, self.steady_bandwidth_gb_s)
        return Speed(self.half_tflops, self.single_tflops, self.bandwidth_gb_s, *steady)


def load_profiles() -> dict[str, Profile]:
    """Return the shipped profiles by key.

    Raises:
        UserError: a file in the folder is not a profile.
    """
    return dict(_read_profiles(shipped("profiles")))


@cache  # to parse them takes longer than to make a plan
def _read_profiles(folder: Path) -> dict[str, Profile]:
    profiles = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            profiles[path.stem] = Profile(key=path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValidationError, TypeError) as error:
            raise UserError(f"profile {path.name} is not valid: {' '.join(str(error).split())}") from error
    return profiles


def find_profile(name: str) -> Profile:
    """Return a shipped profile by its key, in any case and with spaces or underscores for dashes.

    Raises:
        UserError: there is no such profile.
    """
    profiles = load_profiles()
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key in profiles:
        return profiles[key]
    raise UserError(f"profile {name!r} is not known{did_you_mean(key, profiles)} (known: {', '.join(profiles)})")


def match_profile(device: Device) -> Profile:
    """Return the profile of a device with the reason: by name and memory, else one derived from the device.

    A laptop's card carries another name and gets a derived profile: it shares neither bandwidth nor always memory with
    the desktop card.
    """
    profiles = load_profiles()
    if device.on_cpu:
        return profiles["cpu"].model_copy(update={"reason": "the run is on the CPU"})
    name = _MAKERS.sub("", device.name.strip())
    same_name = [
        profile
        for profile in profiles.values()
        if any(re.fullmatch(pattern, name, re.IGNORECASE) for pattern in profile.match)
    ]
    for profile in same_name:
        sizes = [size * MIB for size in (profile.memory_mib, profile.usable_mib) if size]  # Apple's tell the second
        if any(abs(device.total_bytes - size) <= _SAME_MEMORY * size for size in sizes):
            reason = f"the device is a {device.name} with {device.total_bytes / GIB:.1f} GiB"
            return profile.model_copy(update={"reason": reason})
    return _derive(device, same_name)


def _derive(device: Device, same_name: list[Profile]) -> Profile:
    """Return a profile for a card that no file describes."""
    capability = device.compute_capability
    key = f"unknown-{round(device.total_bytes / GIB)}gb" + ("-sm{}{}".format(*capability) if capability else "")
    why = "no profile has this name"
    if same_name:
        others = " and ".join(f"{profile.key} has {(profile.memory_mib or 0) / 1024:.0f} GiB" for profile in same_name)
        why = f"its memory is another's ({others})"
    memory_mib, speed = max(1, device.total_bytes // MIB), device.speed
    return Profile(
        key=key,
        name=device.name,
        backend=device.backend if device.backend in _DEVICES else "cuda",  # type: ignore[arg-type]
        memory_mib=memory_mib,
        usable_mib=max(1, int(memory_mib * _USABLE)),
        compute_capability="{}.{}".format(*capability) if capability else None,
        bf16=device.bf16,
        bandwidth_gb_s=speed.bandwidth_gb_s if speed else None,
        half_tflops=speed.half_tflops if speed else None,
        single_tflops=speed.single_tflops if speed else None,
        match=(),
        sources=("derived from the detected device",),
        reason=f"derived from {device.name} with {device.total_bytes / GIB:.1f} GiB, as {why}",
    )


def profile_device(profile: Profile, vram: str | None = None) -> Device:
    """Return the device to plan for when the card is not in this machine, or not to be looked at.

    Nothing else is taken to use the card: free is what is usable. ``vram`` replaces the card's memory, of which the
    same share is usable as the profile states (an 11 GiB card with 10.75 usable: 97.7 %); for the CPU, all of it.

    Raises:
        UserError: ``vram`` is not an amount of memory.
    """
    total_bytes, free_bytes = _memory(profile)
    if vram is not None:
        asked = parse_bytes(vram)
        share = free_bytes / total_bytes if profile.memory_mib else 1.0
        total_bytes, free_bytes = asked, int(asked * share)
    major, _, minor = (profile.compute_capability or "").partition(".")
    note = f"planned for profile {profile.key}" + (f" with {vram} of memory" if vram else "")
    if profile.memory_mib or vram:
        note += "; this machine's own memory is not looked at"
    return Device(
        torch_device=_DEVICES[profile.backend],
        name=profile.name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        compute_capability=(int(major), int(minor)) if major else None,
        bf16=profile.bf16,
        source="profile",
        notes=tuple(filter(None, (note, never_run(profile.backend)))),
        cores=None if profile.memory_mib else cpu_device().cores,
        speed=profile.speed,
        backend=profile.backend,
    )


def _memory(profile: Profile) -> tuple[int, int]:
    if profile.memory_mib is None:
        cpu = cpu_device()
        return cpu.total_bytes, cpu.free_bytes
    return profile.memory_mib * MIB, (profile.usable_mib or profile.memory_mib) * MIB


def parse_bytes(text: str) -> int:
    """Return the bytes of ``11GB``, ``11GiB``, ``10.5G``, ``11000MiB``: units are powers of 1024, as cards are sold.

    Raises:
        UserError: not an amount of memory, or none at all.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([MGT])(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    amount = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if amount <= 0:
        raise UserError(f"{text!r} is not an amount of memory; write a number with its unit, such as 11GB or 11000MiB")
    if amount > _MOST_MEMORY:
        raise UserError(f"{text!r} is more memory than any machine has; write an amount such as 11GB or 11000MiB")
    return amount
