"""What a device reaches of its speed on paper, and what a kernel takes of it. No torch.

A kernel takes as long as its arithmetic or as its bytes, whichever is more (the roofline of Williams, Waterman and
Patterson, doi 10.1145/1498765.1498785), and a constant for its start. What a card reaches is less than its data sheet
says: a T4 moves 220 of 320 GB/s, and its tensor cores, held back by the power limit, reach 24 of 65 TFLOPS in steady
work (the sources stand in its profile); cuBLAS alone reaches 0.88 to 0.96 of an L20's 119.5 TFLOPS with large square
matrices (github.com/DefTruth/CUDA-Learn-Notes, hgemm). Where nothing was measured, a share between is taken.

A start costs the host what Python, torch and the driver take: 23 microseconds fit all public rows of a T4
(benchmarks/time_t4.py); 31 ms for a token of Qwen3-0.6B with stock transformers and peft on an RTX 4080 make 11, our
own decoding on an H100 30. In a graph a kernel of 2.9 microseconds took 3.4 (developer.nvidia.com/blog/cuda-graphs),
and no kernel takes less than one or two.
"""

from dataclasses import dataclass
from typing import Literal

from lowmem_rlhf.hardware.speed import Speed

Case = Literal["expected", "best", "worst"]


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Attributes:
        half: FLOPs a second of 16-bit products.
        single: of fp32 products.
        bandwidth: bytes a second.
        attention: what share of these FLOPs SDPA's kernels reach.
        start: seconds that each kernel takes beside its work, where kernels are started one by one.
        replayed: the same, where a graph starts them.
        bus: bytes a second between host memory and the card.
    """

    half: float
    single: float
    bandwidth: float
    attention: float
    start: float
    replayed: float
    bus: float

    def worked(self, flops: float, width: int, count: float, attention: bool = False) -> float:
        """Return the seconds of a kernel without its start, by its FLOPs and the bytes that it moves."""
        rate = self.half if width == 2 else self.single
        return max(flops / (rate * self.attention if attention else rate), count / self.bandwidth)


@dataclass(frozen=True)
class _Shares:
    """What is reached of a data sheet: products, bandwidth (and fp32 arithmetic), SDPA; seconds of a start.

    ``steady``: of what was measured in steady work. ``bus``: bytes a second over PCIe, of 16 lanes of the third
    generation, of the fourth, and of 8 lanes of the third, less a quarter.
    """

    multiplied: float
    streamed: float
    steady: float
    attention: float
    start: float
    replayed: float
    bus: float


ATTENTION = 0.38  # these two are fitted to all public rows of a T4 (benchmarks/time_t4.py)
START = 23e-6
_SHARES: dict[Case, _Shares] = {
    "expected": _Shares(0.7, 0.8, 1.0, ATTENTION, START, 2e-6, 12e9),
    "best": _Shares(0.9, 0.92, 1.1, 0.6, 10e-6, 1e-6, 24e9),
    "worst": _Shares(24 / 65, 220 / 320, 0.9, 0.3, 35e-6, 4e-6, 6e9),
}
# of one core: FLOPs a second in bfloat16 with AVX-512's or AMX's products and without, and bytes a second
_CORE_HALF, _CORE_SINGLE, _CORE_BYTES, _MOST_BYTES = 150e9, 40e9, 15e9, 60e9
_CPU_START = 6e-6
_CPU_FACTOR: dict[Case, float] = {"expected": 1.0, "best": 2.5, "worst": 0.33}


def rates(speed: Speed, case: Case = "expected") -> Rates:
    """Return what a card reaches, from its data sheet and from what was measured on it.

    Args:
        case: ``best`` and ``worst`` are the ends of what is known of other cards.
    """
    shares = _SHARES[case]
    half, bandwidth = shares.multiplied * speed.half_tflops, shares.streamed * speed.bandwidth_gb_s
    single = shares.streamed * speed.single_tflops
    if speed.steady_half_tflops:
        half = shares.steady * speed.steady_half_tflops
    if speed.steady_bandwidth_gb_s:
        bandwidth = shares.steady * speed.steady_bandwidth_gb_s
        single = bandwidth / speed.bandwidth_gb_s * speed.single_tflops
    return Rates(
        half * 1e12, single * 1e12, bandwidth * 1e9, shares.attention, shares.start, shares.replayed, shares.bus
    )


def cpu_rates(cores: int, multiplies_half: bool, case: Case = "expected") -> Rates:
    """Return a rough guess at what a CPU reaches; between best and worst lie a factor of 2.5 and of 3.

    Args:
        multiplies_half: it has instructions for products in bfloat16.
    """
    factor = _CPU_FACTOR[case]
    half = cores * (_CORE_HALF if multiplies_half else _CORE_SINGLE) * factor
    start = _CPU_START / factor
    bandwidth = min(cores * _CORE_BYTES, _MOST_BYTES) * factor
    return Rates(half, cores * _CORE_SINGLE * factor, bandwidth, ATTENTION, start, start, bandwidth)


def bus_bandwidth(case: Case = "expected") -> float:
    """Return the bytes a second that are taken to go from a card to another one, or to its host."""
    return _SHARES[case].bus
