"""The same training step as `stock_step`, counted for time: what each kernel multiplies and moves, and how many start.

A result that is taken is one kernel, which writes it; an operation reads its inputs, and its gradient's kernels the
gradient. Products and attention are counted by their FLOPs as well: causal attention computes half of its scores, and
five products in place of two on the way back (FlashAttention, arXiv 2205.14135, section B).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stock_memory import simulated, stock
from stock_memory.allocator import CachingAllocator
from stock_memory.simulated import SimTensor
from stock_memory.stock_run import StockRun
from stock_memory.stock_step import StockStep

from lowmem_rlhf.planning.time.rates import Rates

ADAMW_BYTES = 28  # a trained number: weight, gradient and two moments are read, all but the gradient are written
BACKWARD_PRODUCTS = 2.5  # of attention, in those of its forward pass


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


def seconds(kernels: Mapping[Kernel, float], rates: Rates) -> float:
    """Return how long so many of each kernel take one after another, each started by itself."""
    return sum(
        count * (rates.worked(one.flops, one.width, one.bytes, one.attention) + one.starts * rates.start)
        for one, count in kernels.items()
    )


class TimedStep(StockStep):
    """A step whose kernels are counted once `counting` is set.

    Attributes:
        kernels: how often each kind of kernel starts.
        counting: whether they are counted.
    """

    def __init__(self, run: StockRun) -> None:
        self.kernels: Counter[Kernel] = Counter()
        self.counting = False
        self._product: Kernel | None = None  # that makes the next result
        super().__init__(run, CachingAllocator())

    def _count(self, kernel: Kernel) -> None:
        if self.counting:
            self.kernels[kernel] += 1

    def empty(self, count: int, width: int) -> SimTensor:
        """Take a result: that of the product which was announced, or of a kernel that moves its bytes."""
        made, self._product = self._product or Kernel(), None
        self._count(made.moving(count * width))
        return super().empty(count, width)

    def op(
        self,
        inputs: tuple[SimTensor, ...],
        count: int,
        width: int,
        backward: Callable[..., Any],
        save: tuple[SimTensor | None, ...] = (),
        save_result: bool = False,
        view: bool = False,
    ) -> SimTensor:
        """Run an operation; one that is no product reads its inputs."""
        if not view and self._product is None:
            self._product = Kernel(bytes=sum(x.count * x.width for x in inputs))
        return super().op(inputs, count, width, backward, save, save_result, view)

    def _run(self, node: Any, grad: SimTensor) -> list[SimTensor | None]:
        before, read, leaf = self.kernels.total(), grad.count * grad.width, node.number == simulated.LEAF
        out = super()._run(node, grad)
        if not leaf and self.kernels.total() > before:
            self._count(Kernel(bytes=read, starts=0))
        return out

    def linear(self, x: SimTensor, inputs: int, outputs: int) -> SimTensor:
        """A product, and one for the gradient of ``x``."""
        rows, width = x.count // inputs, x.width
        self._product = product(rows, inputs, outputs, width)
        back = product(rows, outputs, inputs, width)
        return self._backward(super().linear(x, inputs, outputs), back)

    def trained(self, x: SimTensor, inputs: int, outputs: int, key: Any) -> SimTensor:
        """A product, and two for the gradients of the weight and of ``x``."""
        rows = x.count // inputs
        self._product = product(rows, inputs, outputs, 4)
        weight, back = product(inputs, rows, outputs, 4), product(rows, outputs, inputs, 4)
        return self._backward(super().trained(x, inputs, outputs, key), weight, back.less_started())

    def linear_4bit(self, x: SimTensor, inputs: int, outputs: int, compute: int, double: bool) -> SimTensor:
        """The codes are read and the weight is made, each way, then multiplied."""
        rows, codes, half = x.count // inputs, Kernel(bytes=inputs * outputs // 2, starts=0), self.cast(x, compute)
        made, products = self.op, (product(rows, inputs, outputs, compute), product(rows, outputs, inputs, compute))

        def op(given: Any, count: int, width: int, backward: Any, *others: Any, **more: Any) -> SimTensor:
            self._count(codes)
            self._product = products[0]
            out = made(given, count, width, backward, *others, **more)
            return self._backward(out, products[1].less_started(), codes)

        self.op = op  # type: ignore[method-assign]
        try:
            out = super().linear_4bit(half, inputs, outputs, compute, double)
        finally:
            del self.op
        return self.cast(out, x.width)

    def linear_8bit(self, x: SimTensor, inputs: int, outputs: int) -> SimTensor:
        """An integer product, taken to be as fast as one of 16 bits, and one of 16 bits for the gradient of ``x``."""
        rows = x.count // inputs
        self._count(product(rows, inputs, outputs, 2).less_started())
        return self._backward(super().linear_8bit(x, inputs, outputs), product(rows, outputs, inputs, 2))

    def bmm(self, x: SimTensor, y: SimTensor, count: int) -> SimTensor:
        """Scores, or values: a product for each head, and two back."""
        heads = self.run.batch_size * self.sizes.num_heads
        flops = 2 * heads * round((x.count / heads * (y.count / heads) * (count / heads)) ** 0.5)
        self._product = Kernel(flops, x.width, (x.count + y.count) * x.width)
        back = Kernel(flops, x.width, (count + y.count) * x.width)
        return self._backward(super().bmm(x, y, count), back, back.less_started())

    def efficient_attention(self, q: SimTensor, k: SimTensor, v: SimTensor, rows: int) -> SimTensor:
        """Both products in one kernel, and its gradient in another."""
        run, sizes = self.run, self.sizes
        flops = 2 * run.batch_size * sizes.num_heads * sizes.head_dim * run.sequence_length**2
        moved = 4 * q.count * q.width
        self._count(Kernel(flops, q.width, moved, attention=True))
        back = Kernel(round(BACKWARD_PRODUCTS * flops), q.width, 2 * moved, attention=True)
        out = super().efficient_attention(q, k, v, rows)
        return self._then(out, lambda: self._count(back))

    def _backward(self, out: SimTensor, first: Kernel, *others: Kernel) -> SimTensor:
        """Let the gradient's first result be made by a product, beside what else is counted then."""

        def announce() -> None:
            self._product = first
            for kernel in others:
                self._count(kernel)

        return self._then(out, announce)

    def _then(self, out: SimTensor, before: Callable[[], None]) -> SimTensor:
        if out.node is not None:
            backward = out.node.backward

            def run(*given: Any) -> Any:
                before()
                return backward(*given)

            out.node.backward = run
        return out


def product(rows: int, inputs: int, outputs: int, width: int) -> Kernel:
    """Return the product of (rows, inputs) and (inputs, outputs), which reads both."""
    return Kernel(2 * rows * inputs * outputs, width, (rows + outputs) * inputs * width)


def step_kernels(run: StockRun) -> Counter[Kernel]:
    """Return the kernels of a run's second step; the first one makes the optimizer's states."""
    step = TimedStep(run)
    weights = stock.load(step)
    for counting in (False, True):
        step.counting = counting
        logits, loss = step.forward()
        step.backward_from(loss)
        del logits, loss
        step.optimizer_step()
    del weights
    numbers = sum(master.count for master in step.masters.values())
    step.kernels[Kernel(bytes=ADAMW_BYTES * numbers)] += 1  # fused over all of them
    return step.kernels
