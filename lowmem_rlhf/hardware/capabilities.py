"""What all devices of a kind have in common. No torch here.

A kind is the first part of torch's device string: ``cpu``, ``cuda`` (NVIDIA's cards, and AMD's under ROCm), ``xpu``
(Intel's), ``mps`` (Apple's), or a name that another backend gives itself. A backend is the kind, but for AMD's cards,
which torch calls ``cuda``: theirs is ``rocm``. Only this package compares either; everyone else asks what it needs to
know. What behaves in another way gets a row in `CAPABILITIES`.

What is said of bitsandbytes was read in its release 0.50.2, ``backends/*/ops.py`` and ``autograd/_functions.py``.
"""

import importlib.metadata
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB = 1024**2

CUDA_CONTEXT_BYTES = 141 * MIB  # measured on a T4; a process has it before its first tensor
CPU_PROCESS_BYTES = 768 * MIB  # Python with torch, transformers and peft imported


@dataclass(frozen=True)
class Capabilities:
    """What holds for every device of one kind.

    Attributes:
        on_cpu: tensors lie in host memory and the CPU computes with them, so nothing is offloaded to the host, and RAM
            is the budget. Not so for MPS, which shares the RAM but whose tensors are not the CPU's.
        counts_memory: torch counts the bytes of tensors on the device and their peak; elsewhere only the memory of the
            whole process is known.
        pinned_copies: copies to and from page-locked host memory run in the order of the device's stream, so that
            nobody has to wait for them.
        graphs: a sequence of kernels can be captured once and replayed.
        explicit_scores: attention over a few keys is faster with its matrix of scores than with SDPA.
        fast_float16: float16 is as fast as the other 16-bit dtype. A CPU takes 10 to 30 times as long.
        int8_kernel: bitsandbytes multiplies LLM.int8's weights with a kernel that rounds inputs to int8 and computes in
            float16; elsewhere it makes them dense and computes in the model's dtype (``MatMul8bitFp``).
        four_bit_rows: rows that bitsandbytes multiplies with 4-bit weights as they lie; with more it makes the weights
            dense first.
        eight_bit_adamw: bitsandbytes has a kernel for AdamW's step with moments in 8 bits.
        caching_allocator: freed memory is kept in blocks, so that more is reserved than tensors take.
        blas_workspace: the BLAS library takes a workspace from the allocator for each thread and keeps it.
        process_bytes: memory that a process holds before its first tensor; 0 where it is not known.
        tried: this package has run on such a device; what is said of another was read, and is said to be.
        title: what people call such devices.
    """

    on_cpu: bool = False
    counts_memory: bool = True
    pinned_copies: bool = False
    graphs: bool = False
    explicit_scores: bool = False
    fast_float16: bool = True
    int8_kernel: bool = True
    four_bit_rows: int = 0
    eight_bit_adamw: bool = False
    caching_allocator: bool = True
    blas_workspace: bool = False
    process_bytes: int = 0
    tried: bool = False
    title: str = "this kind of device"


CAPABILITIES = {
    "cpu": Capabilities(
        on_cpu=True,
        counts_memory=False,
        explicit_scores=True,
        fast_float16=False,
        int8_kernel=False,
        four_bit_rows=64,
        eight_bit_adamw=True,
        caching_allocator=False,
        process_bytes=CPU_PROCESS_BYTES,
        tried=True,
        title="CPUs",
    ),
    "cuda": Capabilities(
        pinned_copies=True,
        graphs=True,
        four_bit_rows=64,
        eight_bit_adamw=True,
        blas_workspace=True,
        process_bytes=CUDA_CONTEXT_BYTES,
        tried=True,
        title="cards of NVIDIA",
    ),
    # torch.cuda is HIP there, streams and graphs included; a context is taken to be as large as CUDA's. 4 rows on every
    # chip (8 on RDNA 3 and 4).
    "rocm": Capabilities(
        pinned_copies=True,
        graphs=True,
        four_bit_rows=4,
        eight_bit_adamw=True,
        blas_workspace=True,
        process_bytes=CUDA_CONTEXT_BYTES,
        title="cards of AMD (ROCm)",
    ),
    "xpu": Capabilities(int8_kernel=False, four_bit_rows=1, eight_bit_adamw=True, title="cards of Intel (XPU)"),
    "mps": Capabilities(counts_memory=False, title="Apple's chips (MPS)"),
}
ACCELERATOR = Capabilities()  # any other: what torch asks of every backend, and nothing that was not tried


def kind_of(device: "str | torch.device") -> str:
    """Return the kind of a device: ``cuda`` of ``cuda:1``."""
    return device.partition(":")[0] if isinstance(device, str) else device.type


def backend_of(device: "str | torch.device") -> str:
    """Return the backend that computes on a device of this machine: ``rocm`` of ``cuda:0`` where torch is AMD's."""
    kind = kind_of(device)
    return "rocm" if kind == "cuda" and torch_is_for_rocm() else kind


def torch_is_for_rocm() -> bool:
    """Say whether this torch was built for AMD's cards; torch is not imported for it."""
    version = getattr(sys.modules.get("torch"), "version", None)
    return _names_rocm() if version is None else getattr(version, "hip", None) is not None


@cache
def _names_rocm() -> bool:
    try:
        return "rocm" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def capabilities(device: "str | torch.device") -> Capabilities:
    """Return what holds for devices of this one's kind on this machine.

    Args:
        device: a torch device, or its string (``cuda:0``).
    """
    return capabilities_of(backend_of(device))


def capabilities_of(backend: str) -> Capabilities:
    """Return what holds for devices of a backend, which need not be here."""
    return CAPABILITIES.get(backend, ACCELERATOR)


def never_run(backend: str) -> str | None:
    """Return what is to be said of a backend that this package was never run on; None of the others."""
    of = capabilities_of(backend)
    return (
        None if of.tried else f"this package was never run on {of.title}: what it says of them was read (docs/cards.md)"
    )
