"""The work of a part of a step: its kernels, their FLOPs and bytes, and the seconds that a device takes for these."""

from lowmem_rlhf.planning.time.rates import Rates


class Work:
    """Kernels that follow one another. An operation of torch or bitsandbytes that starts kernels counts as one.

    A kernel reads all of its inputs and writes its result, each once; what is changed in place is read and written.

    Attributes:
        flops, bytes, kernels: of all of them.
        seconds: of all of them, without their starts.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.flops = self.bytes = self.kernels = self.seconds = 0.0

    def move(self, count: float, kernels: float = 1) -> None:
        """Add kernels that read and write so many bytes together."""
        self.bytes += count
        self.kernels += kernels
        self.seconds += count / self.rates.bandwidth

    def product(self, rows: float, inputs: float, outputs: float, width: int, adds: bool = False) -> None:
        """Add a product of (rows, inputs) with (inputs, outputs), which may add to what is there."""
        read = (rows + outputs) * inputs + (rows * outputs if adds else 0)
        self.multiply(2 * rows * inputs * outputs, width, (read + rows * outputs) * width)

    def multiply(self, flops: float, width: int, count: float, attention: bool = False, kernels: float = 1) -> None:
        """Add a kernel with so many FLOPs, of numbers of ``width`` bytes, that moves so many bytes."""
        self.flops += flops
        self.bytes += count
        self.kernels += kernels
        self.seconds += self.rates.worked(flops, width, count, attention)

    def fetch(self, count: float) -> None:
        """Add copies of so many bytes from host memory."""
        self.seconds += count / self.rates.bus

    def add(self, other: "Work", times: float = 1) -> None:
        """Add the work of another part, so many times; a negative number takes it away."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.kernels += times * other.kernels
        self.seconds += times * other.seconds

    def started(self) -> float:
        """Return the seconds of it all where each kernel is started by itself."""
        return self.seconds + self.kernels * self.rates.start

    def replayed(self) -> float:
        """Return the seconds of it all where graphs start the kernels."""
        return self.seconds + self.kernels * self.rates.replayed
