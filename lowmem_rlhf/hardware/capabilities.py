"""What all devices of a kind have in common. No torch here.

A kind is the first part of torch's device string: ``cpu``, ``cuda`` (NVIDIA's cards, and AMD's under ROCm), ``xpu``,
``mps``, or a name that another backend gives itself. Only this package compares kinds; everyone else asks what it needs
to know. A kind that behaves in another way gets a row in `CAPABILITIES`.
"""

from dataclasses import dataclass
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
            float16; a CPU computes in the model's dtype.
        caching_allocator: freed memory is kept in blocks, so that more is reserved than tensors take.
        blas_workspace: the BLAS library takes a workspace from the allocator for each thread and keeps it.
        process_bytes: memory that a process holds before its first tensor; 0 where it is not known.
    """

    on_cpu: bool = False
    counts_memory: bool = True
    pinned_copies: bool = False
    graphs: bool = False
    explicit_scores: bool = False
    fast_float16: bool = True
    int8_kernel: bool = True
    caching_allocator: bool = True
    blas_workspace: bool = False
    process_bytes: int = 0


CAPABILITIES = {
    "cpu": Capabilities(
        on_cpu=True,
        counts_memory=False,
        explicit_scores=True,
        fast_float16=False,
        int8_kernel=False,
        caching_allocator=False,
        process_bytes=CPU_PROCESS_BYTES,
    ),
    "cuda": Capabilities(pinned_copies=True, graphs=True, blas_workspace=True, process_bytes=CUDA_CONTEXT_BYTES),
    "mps": Capabilities(counts_memory=False),
}
ACCELERATOR = Capabilities()  # any other kind: what torch asks of every backend, and nothing that was not tried


def kind_of(device: "str | torch.device") -> str:
    """Return the kind of a device: ``cuda`` of ``cuda:1``."""
    return device.partition(":")[0] if isinstance(device, str) else device.type


def capabilities(device: "str | torch.device") -> Capabilities:
    """Return what holds for devices of this one's kind.

    Args:
        device: a torch device, or its string (``cuda:0``).
    """
    return CAPABILITIES.get(kind_of(device), ACCELERATOR)
