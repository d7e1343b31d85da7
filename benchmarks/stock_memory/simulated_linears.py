"""Linear layers of torch, peft and bitsandbytes, as sizes: what each takes and keeps."""

from typing import Any

from stock_memory.allocator import CachingAllocator
from stock_memory.simulated import WEIGHT, SimTensor
from stock_memory.simulated_ops import Ops

NF4_BLOCK = 64  # weights that share a scale
DOUBLE_QUANT_BLOCK = 256  # scales that share a scale


class Linears(Ops):
    """Operations with weights.

    Attributes:
        masters: the trained weights of adapters, float32, by key.
    """

    def __init__(self, allocator: CachingAllocator) -> None:
        super().__init__(allocator)
        self.masters: dict[Any, SimTensor] = {}

    def linear(self, x: SimTensor, inputs: int, outputs: int) -> SimTensor:
        """A frozen 16- or 32-bit layer: keeps the weight, so ``x`` may go."""
        rows, width = x.count // inputs, x.width
        out = self.op((x,), rows * outputs, width, lambda g, _: (self.matmul(rows * inputs, width),), (WEIGHT,))
        self.workspace()
        return out

    def trained(self, x: SimTensor, inputs: int, outputs: int, key: Any) -> SimTensor:
        """A float32 layer of an adapter: keeps ``x``."""
        rows = x.count // inputs

        def backward(g: SimTensor, a: SimTensor, b: None) -> tuple[SimTensor, SimTensor]:
            with self.counted_as("gradients"):
                weight = self.matmul(inputs * outputs, 4)
            return self.matmul(rows * inputs, 4), weight

        out = self.op((x, self.leaf(self.masters[key], key)), rows * outputs, 4, backward, (x, WEIGHT))
        self.workspace()
        return out

    def linear_4bit(self, x: SimTensor, inputs: int, outputs: int, compute: int, double: bool) -> SimTensor:
        """bitsandbytes' ``Linear4bit``: ``x`` and beside the product the whole weight in the compute dtype, each way.

        ``MatMul4Bit`` keeps neither. The result has the dtype of ``x`` again. With ``double`` quantization the scales
        are made first.
        """
        width, rows = x.width, x.count // inputs

        def weight() -> SimTensor:
            if double:
                scales = self.empty(inputs * outputs // NF4_BLOCK, 4)
            out = self.empty(inputs * outputs, compute)
            if double:
                del scales
            return out

        def backward(g: SimTensor) -> tuple[SimTensor]:
            dequantized = weight()
            out = self.matmul(rows * inputs, compute)
            del dequantized
            return (out,)

        x = self.cast(x, compute)
        dequantized = weight()
        out = self.op((x,), rows * outputs, compute, backward)
        self.workspace()
        del dequantized
        return self.cast(out, width)

    def linear_8bit(self, x: SimTensor, inputs: int, outputs: int) -> SimTensor:
        """bitsandbytes' ``Linear8bitLt``: 8-bit ``x``, a 32-bit integer product, then 16 bits.

        ``MatMul8bitLt`` keeps ``x`` as an attribute, where no checkpoint can take it away, and makes the weight in the
        dtype of ``x`` for the gradient.
        """
        width, rows = x.width, x.count // inputs

        def backward(g: SimTensor, kept: SimTensor = SimTensor(x.storage, x.count, width)) -> tuple[SimTensor]:  # noqa: B008
            weight = self.empty(inputs * outputs, kept.width)
            out = self.matmul(rows * inputs, width)
            del weight
            return (out,)

        half = self.cast(x, 2)
        quantized = self.like(x, 1)
        del half
        product = self.empty(rows * outputs, 4)
        out = self.op((x,), rows * outputs, width, backward)
        del product, quantized
        return out
