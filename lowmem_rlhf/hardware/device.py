"""What is known of a device: the value that detection returns and the plan reads. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lowmem_rlhf.hardware.capabilities import Capabilities, capabilities, capabilities_of, kind_of
from lowmem_rlhf.hardware.speed import Speed


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
        slow_half: a CPU without AVX-512, where a product in 16 bits takes many times as long as one in fp32.
        cores: of a CPU that a process may use; None for other devices.
        speed: what it computes and moves in a second; None where nobody tells.
        backend: as in `hardware.capabilities`; None: that of the torch device on this machine.
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
    slow_half: bool = False
    cores: int | None = None
    speed: Speed | None = None
    backend: str | None = None

    @property
    def kind(self) -> str:
        """The first part of torch's device string, for example ``cuda``."""
        return kind_of(self.torch_device)

    @property
    def capabilities(self) -> Capabilities:
        """What holds for every device of this backend."""
        return capabilities_of(self.backend) if self.backend else capabilities(self.torch_device)

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes, with the RAM as the budget."""
        return self.capabilities.on_cpu

    @property
    def half_dtype(self) -> str:
        """The 16-bit dtype to compute in: ``bfloat16`` (any CPU: float16 is slow there), or ``float16`` without it."""
        return "bfloat16" if self.bf16 or self.on_cpu else "float16"

    @property
    def int8_dtype(self) -> str:
        """The dtype that LLM.int8's weights compute in: ``float16`` where bitsandbytes has a kernel for them."""
        return "float16" if self.capabilities.int8_kernel else self.half_dtype

    def multiplies_four_bit(self, compute_dtype: str) -> bool:
        """Whether a CPU has a product with 4-bit weights as they lie, which AVX-512 has for bfloat16 only."""
        return self.avx512_bf16 and compute_dtype == "bfloat16"

    @property
    def process_bytes(self) -> int:
        """Bytes of ``free_bytes`` that a process takes before its first tensor.

        Zero where torch measured what is free: this process held them already.
        """
        return 0 if self.source == "torch" else self.capabilities.process_bytes

    @property
    def is_present(self) -> bool:
        """Whether the device was found in this machine; else a profile stands for it."""
        return self.source != "profile"

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
        if known.get("speed"):
            names = {one.name for one in fields(Speed)}
            known["speed"] = Speed(**{name: value for name, value in known["speed"].items() if name in names})
        return cls(**known)
