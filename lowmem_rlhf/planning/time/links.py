"""What processes send each other in a collective operation, and how long it takes. No torch.

Of the algorithms that NCCL and gloo have the ring is counted: each process sends to its neighbour, round and round, so
all links carry as many bytes, and the slowest one decides (Patarasuk and Yuan, doi 10.1016/j.jpdc.2008.09.002).
"""

from dataclasses import dataclass

# seconds of a collective, and of each hop within a machine and to another one: those of the ring with the protocol
# Simple by which NCCL chooses its algorithms (`baseLat` and `hwLat` of src/graph/tuning.cc)
COLLECTIVE, HOP, NETWORK_HOP = 8.4e-6, 5.7e-6, 14e-6


@dataclass(frozen=True)
class Ring:
    """Processes that send to each other in a ring.

    Attributes:
        processes: N.
        bandwidth: of the slowest link, in bytes a second.
        hop: seconds of the slowest hop from one process to the next.
    """

    processes: int
    bandwidth: float
    hop: float = HOP

    def gathering(self, count: float, times: int = 1) -> float:
        """Return the seconds in which all get what each has a part of: ``count`` bytes in all, in so many collectives.

        Of each process's part every other one is a hop further: N - 1 rounds.
        """
        rounds = self.processes - 1
        return sent_gathering(count, self.processes) / self.bandwidth + times * (COLLECTIVE + rounds * self.hop)

    def summing(self, count: float) -> float:
        """Return the seconds in which ``count`` bytes of each process are summed up for all: 2 (N - 1) rounds."""
        rounds = 2 * (self.processes - 1)
        return sent_summing(count, self.processes) / self.bandwidth + COLLECTIVE + rounds * self.hop


def sent_gathering(count: float, processes: int) -> float:
    """Return the bytes that each process sends in an all-gather: ``(N - 1) / N`` of the ``count`` that all have."""
    return count * (processes - 1) / processes


def sent_summing(count: float, processes: int) -> float:
    """Return the bytes that each process sends in an all-reduce of ``count`` bytes: ``2 (N - 1) / N`` of them."""
    return 2 * count * (processes - 1) / processes
