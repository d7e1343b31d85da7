"""What a card computes and moves in a second, and what a kernel takes of it. No torch.

A kernel takes as long as its arithmetic or as its bytes, whichever is more (the roofline of Williams, Waterman and
Patterson, doi 10.1145/1498765.1498785), and a constant for its start. What a card reaches is less than its data sheet
says: a T4 moves 220 of 320 GB/s (Jia et al., arXiv 1903.07486), and its tensor cores, held back by the power limit,
reach 24 of 65 TFLOPS in steady work (forums.developer.nvidia.com/t/about-gpu-peak-performance/264462). The first share
is taken for bandwidth and for fp32 arithmetic of every card, the second for products in 16 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

STREAMED = 220 / 320  # of bandwidth, and of fp32 arithmetic
MULTIPLIED = 24 / 65  # of what tensor cores do in 16 bits with sums in fp32


@dataclass(frozen=True)
class Kernel:
    """What a kernel does.

    Attributes:
        flops: of its products.
        width: bytes of a number that it multiplies: 2 (tensor cores), or 4.
        bytes: that it reads and writes.
        attention: it is SDPA's, whose products reach less (`Rates.attention`).
        starts: kernels that it stands for.
    """

    flops: int = 0
    width: int = 4
    bytes: int = 0
    attention: bool = False
    starts: int = 1

    def moving(self, count: int) -> "Kernel":
        """Return the same kernel with more bytes."""
        return replace(self, bytes=self.bytes + count)

    def less_started(self) -> "Kernel":
        """Return the same kernel, whose start is counted elsewhere."""
        return replace(self, starts=0)


@dataclass(frozen=True)
class Rates:
    """What a card reaches.

    Attributes:
        half: FLOPs a second of 16-bit products.
        single: of fp32 products.
        bandwidth: bytes a second.
        attention: what share of these FLOPs SDPA's kernels reach.
        start: seconds that each kernel takes beside its work, where kernels are started one by one.
    """

    half: float
    single: float
    bandwidth: float
    attention: float
    start: float

    def seconds(self, kernels: Mapping[Kernel, float]) -> float:
        """Return how long so many of each kernel take one after another."""
        return sum(count * self._of(kernel) for kernel, count in kernels.items())

    def _of(self, kernel: Kernel) -> float:
        rate = self.half if kernel.width == 2 else self.single
        if kernel.attention:
            rate *= self.attention
        return max(kernel.flops / rate, kernel.bytes / self.bandwidth) + kernel.starts * self.start


# Fitted to all public rows of a T4 (benchmarks/time_t4.py).
ATTENTION = 0.38
START = 23e-6


def rates(half_tflops: float, single_tflops: float, bandwidth_gb_s: float) -> Rates:
    """Return what a card reaches, from its data sheet."""
    return Rates(
        half=MULTIPLIED * half_tflops * 1e12,
        single=STREAMED * single_tflops * 1e12,
        bandwidth=STREAMED * bandwidth_gb_s * 1e9,
        attention=ATTENTION,
        start=START,
    )
