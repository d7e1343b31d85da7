"""What a card computes and moves in a second, from its data sheet or from what its driver tells. No torch here."""

import re
from dataclasses import dataclass

# of clocks as the driver tells them at most, what a card holds in steady work (its boost clock, as it is sold)
_HELD_CLOCK = 0.8
# Turing's small chips, without tensor cores: GTX 1630 to 1660, MX450 and MX550, T400 to T1200, Quadro T1000 and T2000
_PLAIN_TURING = re.compile(r"GTX|\bMX\d|\bT(?:[4-9]00|550|1[02]00|2000)\b")


@dataclass(frozen=True)
class Speed:
    """What a device reaches on paper, and in steady work where that was measured.

    Attributes:
        half_tflops: 10^12 FLOPs a second of 16-bit products with sums in fp32, without sparsity.
        single_tflops: the same of fp32 arithmetic.
        bandwidth_gb_s: memory bandwidth in 10^9 bytes a second.
        steady_half_tflops, steady_bandwidth_gb_s: what was measured in steady work; None where nobody has.
    """

    half_tflops: float
    single_tflops: float
    bandwidth_gb_s: float
    steady_half_tflops: float | None = None
    steady_bandwidth_gb_s: float | None = None


def speed_of_clocks(
    name: str, capability: tuple[int, int], cores: int, clock_mhz: int, memory_clock_mhz: int, bus_bits: int
) -> Speed:
    """Return the speed of a card that no profile describes, from what its driver tells.

    A core has one fused multiply-add a clock. Tensor cores multiply 16-bit numbers with fp32 sums at a fixed multiple
    of that (NVIDIA's whitepapers of each generation): GeForce cards 4 (Turing) or 2 (since Ampere), others twice as
    much and more. Memory moves two bits a pin and clock, as NVML counts clocks.

    Args:
        clock_mhz, memory_clock_mhz: the highest clocks of cores and memory.
        bus_bits: width of the memory bus.
    """
    single = 2 * cores * clock_mhz * 1e-6 * _HELD_CLOCK
    return Speed(single * _half_rate(name, capability), single, 2 * memory_clock_mhz * 1e-3 * bus_bits / 8)


def _half_rate(name: str, capability: tuple[int, int]) -> int:
    """Return how many times as fast as fp32 arithmetic products in 16 bits are."""
    if capability < (7, 0):
        return 1
    if capability == (7, 5) and _PLAIN_TURING.search(name):
        return 2
    if capability in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return 16
    if capability < (8, 0):
        return 4 if "GeForce" in name else 8
    return 2 if "GeForce" in name else 4
