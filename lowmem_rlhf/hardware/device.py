"""What is known of a device: the value that detection returns and the plan reads. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Device:
    """One device to run on.

    Attributes:
        torch_device: torch's device string, for example ``cuda:0`` or ``cpu``.
        name: the maker's name of the device.
        total_bytes: memory of the device (RAM for the CPU).
        free_bytes: memory free now; the plan is made from this.
        compute_capability: ``(major, minor)`` of a CUDA device, otherwise None.
        bf16: whether bfloat16 is computed natively.
        driver: version of the driver, if known.
        display_bytes: memory that desktop (graphics) processes hold, if known.
        other_bytes: memory in use that is not the display's (other processes, the driver), if known.
        processes: ``{"pid", "name", "kind" ("compute"|"graphics"), "bytes" (int or None)}`` each.
        source: ``nvml``, ``torch``, ``cpu`` or ``profile``.
        notes: sentences for the user, for example why this card of several was taken.
        avx512_bf16: a CPU that has these instructions, which products with 4-bit weights need.
        compiler: path of a C compiler for `engine.decode.native`, where a CPU has use for one.
    """

    torch_device: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None
    bf16: bool
    driver: str | None = None
    display_bytes: int | None = None
    other_bytes: int | None = None
    processes: tuple[dict[str, Any], ...] = ()
    source: str = "cpu"
    notes: tuple[str, ...] = field(default=())
    avx512_bf16: bool = False
    compiler: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Device":
        """Return the device that `to_dict` described; keys that are no fields are left out, lists become tuples.

        Raises:
            TypeError: a field without a default is missing.
        """
        known: dict[str, Any] = {}
        for name in [one.name for one in fields(cls) if one.name in values]:
            known[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
        return cls(**known)
