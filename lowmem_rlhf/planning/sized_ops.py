"""The operations of stock transformers models, peft adapters and bitsandbytes layers, as sizes: what each takes.

Every method names where its count comes from. Gradients of frozen weights are never made. Where torch's generated code
makes several gradients, it makes them in the alphabetical order of the arguments' names, and so does this.
"""

from typing import Any

from lowmem_rlhf.planning.allocator import CachingAllocator
from lowmem_rlhf.planning.sized import WEIGHT, Graph, Sized

CUBLAS_WORKSPACE = 2 * 4096 * 1024 + 8 * 16 * 1024  # ":4096:2:16:8", torch's default on cards before Hopper
NF4_BLOCK = 64  # weights that share a scale
DOUBLE_QUANT_BLOCK = 256  # scales that share a scale


class Ops(Graph):
    """Operations on `Sized` tensors.

    Attributes:
        fused_softmax: on CUDA a float16 softmax with a float32 result makes no float32 copy of its input first.
        softmax_scratch: on CUDA the gradient of a softmax needs ``gradient * result`` (``softmax_backward_cuda_out``).
    """

    fused_softmax = True
    softmax_scratch = True

    def __init__(self, allocator: CachingAllocator) -> None:
        super().__init__(allocator)
        self.masters: dict[Any, Sized] = {}  # the trained weights, float32, by key
        self._workspaces: dict[bool, Sized] = {}

    def workspace(self) -> None:
        """Keep cuBLAS's workspace: one for each thread that multiplies, and autograd's is a thread of its own."""
        if self.in_backward not in self._workspaces:
            with self.counted_as("workspaces"):
                self._workspaces[self.in_backward] = self.empty(CUBLAS_WORKSPACE, 1)

    def matmul(self, count: int, width: int) -> Sized:
        """Take the result of a product."""
        out = self.empty(count, width)
        self.workspace()
        return out

    # --- elementwise -------------------------------------------------------------------------------------------------

    def cast(self, x: Sized, width: int) -> Sized:
        """``x.to(dtype)``: nothing where the dtype is the same; the gradient is cast back."""
        before = x.width
        return x if before == width else self.op((x,), x.count, width, lambda g: (self.like(g, before),))

    def scale(self, x: Sized, save: tuple[Sized | None, ...] = ()) -> Sized:
        """``x`` times or over something that needs no gradient (a number, a frozen norm, cos): one product each way."""
        return self.op((x,), x.count, x.width, lambda g, *_: (self.like(g),), save)

    def activate(self, x: Sized) -> Sized:
        """SiLU, or GELU in one kernel: keeps its input."""
        return self.scale(x, (x,))

    def tanh(self, x: Sized) -> Sized:
        """Keeps its result."""
        return self.op((x,), x.count, x.width, lambda g, _: (self.like(g),), save_result=True)

    def add(self, x: Sized, y: Sized) -> Sized:
        """Keeps nothing; both inputs get the same gradient, cast where their dtypes differ."""
        a, b = x.width, y.width
        return self.op((x, y), x.count, max(a, b), lambda g: (self._fit(g, a), self._fit(g, b)))

    def _fit(self, g: Sized, width: int) -> Sized:
        return g if g.width == width else self.like(g, width)

    def mul(self, x: Sized, y: Sized) -> Sized:
        """Keeps both factors."""

        def backward(g: Sized, a: Sized, b: Sized) -> tuple[Sized, Sized]:
            other = self.like(g)
            return self.like(g), other

        return self.op((x, y), x.count, x.width, backward, (x, y))

    def shift(self, x: Sized) -> Sized:
        """``x`` plus something that needs no gradient (a mask), or a copy in another layout: the gradient passes."""
        return self.op((x,), x.count, x.width, lambda g: (g,))

    def folded(self, x: Sized) -> Sized:
        """``(B, heads, T, dim)`` seen as ``(B * T, heads * dim)``: its gradient lies the other way and is copied."""
        return self.op((x,), x.count, x.width, lambda g: (self.like(g),), view=True)

    def slice(self, x: Sized, count: int) -> Sized:
        """A part of ``x``, in its memory; ``slice_backward`` fills a whole tensor of zeros."""
        whole, width = x.count, x.width
        return self.op((x,), count, width, lambda g: (self.empty(whole, width),), view=True)

    def rotate(self, x: Sized) -> Sized:
        """``x * cos + rotate_half(x) * sin``: negation, concatenation, two products, a sum; ``x`` is not kept."""
        half, width = x.count // 2, x.width

        def unrotate(g: Sized) -> tuple[Sized]:
            negated = self.empty(half, width)
            first = self.empty(2 * half, width)
            del negated
            second = self.empty(2 * half, width)
            if not self.adds_in_place:
                first = self.like(second)
            del second
            return (first,)

        def rotated(y: Sized) -> Sized:
            negated = self.empty(half, width)
            out = self.op((y,), 2 * half, width, unrotate)
            del negated
            return out

        return self.add(self.scale(x), self.scale(rotated(x)))

    # --- norms -------------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Sized, size: int, cast_last: bool = False) -> Sized:
        """RMSNorm in Python: float32 ``x`` and the inverse root are kept, five float32 temporaries on the way back.

        Llama casts the normed values and multiplies by the weight then; Gemma multiplies first (``cast_last``).
        """
        width = x.width
        h = self.cast(x, 4)
        rows = h.count // size
        inverse = self._inverse_root(self.scale(self._mean_square(h, rows)))
        h = self._normalize(h, inverse)
        return self.cast(self.scale(h), width) if cast_last else self.scale(self.cast(h, width))

    def _mean_square(self, h: Sized, rows: int) -> Sized:
        def power_backward(_: Sized, kept: Sized) -> tuple[Sized]:  # gradient * (2 * kept ** 1)
            power = self.like(kept)
            doubled = self.like(kept)
            del power
            out = self.like(doubled)
            return (out,)

        squares = self.op((h,), h.count, 4, power_backward, (h,))
        whole = squares.count
        return self.op((squares,), rows, 4, lambda g: (self.empty(whole, 4),))

    def _inverse_root(self, mean: Sized) -> Sized:
        return self.op((mean,), mean.count, 4, lambda g, _: (self.like(g),), save_result=True)

    def _normalize(self, h: Sized, inverse: Sized) -> Sized:
        def backward(g: Sized, a: Sized, b: Sized) -> tuple[Sized, Sized]:
            product = self.like(g)  # reduced to one number a row
            reduced = self.like(b)
            del product
            return self.like(g), reduced

        return self.op((h, inverse), h.count, 4, backward, (h, inverse))

    # --- linear layers -----------------------------------------------------------------------------------------------

    def linear(self, x: Sized, inputs: int, outputs: int) -> Sized:
        """A frozen 16- or 32-bit layer: keeps the weight, so ``x`` may go."""
        rows, width = x.count // inputs, x.width
        out = self.op((x,), rows * outputs, width, lambda g, _: (self.matmul(rows * inputs, width),), (WEIGHT,))
        self.workspace()
        return out

    def trained(self, x: Sized, inputs: int, outputs: int, key: Any) -> Sized:
        """A float32 layer of an adapter: keeps ``x``."""
        rows = x.count // inputs

        def backward(g: Sized, a: Sized, b: None) -> tuple[Sized, Sized]:
            with self.counted_as("gradients"):
                weight = self.matmul(inputs * outputs, 4)
            return self.matmul(rows * inputs, 4), weight

        out = self.op((x, self.leaf(self.masters[key], key)), rows * outputs, 4, backward, (x, WEIGHT))
        self.workspace()
        return out

    def linear_4bit(self, x: Sized, inputs: int, outputs: int, double: bool) -> Sized:
        """bitsandbytes' ``Linear4bit``: ``x`` in 16 bits, the whole weight in 16 bits beside the product, each way.

        ``MatMul4Bit`` keeps neither. The result has the dtype of ``x`` again.
        """
        width, rows = x.width, x.count // inputs

        def weight() -> Sized:
            if double:
                scales = self.empty(inputs * outputs // NF4_BLOCK, 4)
            out = self.empty(inputs * outputs, 2)
            if double:
                del scales
            return out

        def backward(g: Sized) -> tuple[Sized]:
            dequantized = weight()
            out = self.matmul(rows * inputs, 2)
            del dequantized
            return (out,)

        x = self.cast(x, 2)
        dequantized = weight()
        out = self.op((x,), rows * outputs, 2, backward)
        self.workspace()
        del dequantized
        return self.cast(out, width)

    def linear_8bit(self, x: Sized, inputs: int, outputs: int) -> Sized:
        """bitsandbytes' ``Linear8bitLt``: 8-bit ``x``, a 32-bit integer product, then 16 bits.

        ``MatMul8bitLt`` keeps ``x`` as an attribute, where no checkpoint can take it away, and makes the weight in the
        dtype of ``x`` for the gradient.
        """
        width, rows = x.width, x.count // inputs

        def backward(g: Sized, kept: Sized = Sized(x.storage, x.count, width)) -> tuple[Sized]:  # noqa: B008
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

    # --- attention ---------------------------------------------------------------------------------------------------

    def repeat(self, x: Sized, times: int) -> Sized:
        """``repeat_kv``: a copy for each head; the gradient is summed back."""
        count, width = x.count, x.width
        if times == 1:
            return x
        return self.op((x,), count * times, width, lambda g: (self.empty(count, width),))

    def bmm(self, x: Sized, y: Sized, count: int) -> Sized:
        """A batched product: keeps both."""

        def backward(g: Sized, a: Sized, b: Sized) -> tuple[Sized, Sized]:
            other = self.matmul(b.count, b.width)
            return self.matmul(a.count, a.width), other

        out = self.op((x, y), count, x.width, backward, (x, y))
        self.workspace()
        return out

    def softmax(self, x: Sized, is_half: bool) -> Sized:
        """``softmax(x, dtype=float32)``: keeps its float32 result, and on the way back makes ``gradient * result``."""
        if not (self.fused_softmax and is_half):
            x = self.cast(x, 4)
        width = x.width

        def backward(g: Sized, result: Sized) -> tuple[Sized]:
            out = self.like(g, width)
            if self.softmax_scratch:
                self.like(g)
            return (out,)

        return self.op((x,), x.count, 4, backward, save_result=True)

    def efficient_attention(self, q: Sized, k: Sized, v: Sized, rows: int) -> Sized:
        """``_scaled_dot_product_efficient_attention``: keeps q, k, v, its result and a float32 number a row.

        The way back makes three gradients, a float32 number a row, and in 16 bits a float32 sum for q's gradient.
        """
        sums = self.empty(rows, 4)

        def backward(g: Sized, *kept: Sized) -> tuple[Sized, ...]:
            grads = tuple([self.like(x) for x in kept[:3]])
            delta = self.like(kept[3])
            if kept[0].width == 2:
                self.like(kept[0], 4)
            del delta
            return grads

        return self.op((q, k, v), q.count, q.width, backward, (q, k, v, sums), save_result=True)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def cross_entropy(self, logits: Sized) -> Sized:
        """``ForCausalLMLoss``: float32 logits, ``log_softmax`` (keeps its result), ``nll_loss`` (a whole gradient).

        So a float32 copy of all logits is alive for the log-probabilities and, when the gradient of ``log_softmax`` is
        made, one each for the gradient of ``nll_loss`` and for the result, beside the logits that the caller holds.
        """
        whole = logits.count
        logits = self.cast(logits, 4)
        logps = self.op((logits,), whole, 4, lambda g, _: (self.like(g),), save_result=True)
        return self.op((logps,), 1, 4, lambda g, _: (self.empty(whole, 4),), (logps,))
