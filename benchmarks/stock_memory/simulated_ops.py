"""The operations of stock transformers models, as sizes: what each takes and keeps. Linears: simulated_linears.py.

Every method names where its count comes from. Gradients of frozen weights are never made. Where torch's generated code
makes several gradients, it makes them in the alphabetical order of the arguments' names, and so does this.
"""

from stock_memory.allocator import CachingAllocator
from stock_memory.simulated import Graph, SimTensor

from lowmem_rlhf.planning.memory.resident import cublas_workspace

WORKSPACE = cublas_workspace((7, 5))  # the measurements of stock steps are a T4's


class Ops(Graph):
    """Operations on `SimTensor` tensors.

    Attributes:
        fused_softmax: on CUDA a float16 softmax with a float32 result makes no float32 copy of its input first.
        softmax_scratch: on CUDA the gradient of a softmax needs ``gradient * result`` (``softmax_backward_cuda_out``).
    """

    fused_softmax = True
    softmax_scratch = True

    def __init__(self, allocator: CachingAllocator) -> None:
        super().__init__(allocator)
        self._workspaces: dict[bool, SimTensor] = {}

    def workspace(self) -> None:
        """Keep cuBLAS's workspace: one for each thread that multiplies, and autograd's is a thread of its own."""
        if self.in_backward not in self._workspaces:
            with self.counted_as("workspaces"):
                self._workspaces[self.in_backward] = self.empty(WORKSPACE, 1)

    def matmul(self, count: int, width: int) -> SimTensor:
        """Take the result of a product."""
        out = self.empty(count, width)
        self.workspace()
        return out

    # --- elementwise -------------------------------------------------------------------------------------------------

    def cast(self, x: SimTensor, width: int) -> SimTensor:
        """``x.to(dtype)``: nothing where the dtype is the same; the gradient is cast back."""
        before = x.width
        return x if before == width else self.op((x,), x.count, width, lambda g: (self.like(g, before),))

    def scale(self, x: SimTensor, save: tuple[SimTensor | None, ...] = ()) -> SimTensor:
        """``x`` times or over something that needs no gradient (a number, a frozen norm, cos): one product each way."""
        return self.op((x,), x.count, x.width, lambda g, *_: (self.like(g),), save)

    def activate(self, x: SimTensor) -> SimTensor:
        """SiLU, or GELU in one kernel: keeps its input."""
        return self.scale(x, (x,))

    def tanh(self, x: SimTensor) -> SimTensor:
        """Keeps its result, as ReLU does."""
        return self.op((x,), x.count, x.width, lambda g, _: (self.like(g),), save_result=True)

    def gelu_new(self, x: SimTensor) -> SimTensor:
        """``0.5 * x * (1 + tanh(c * (x + d * x ** 3)))`` in Python (GPT-2, Phi): eight results, four kept."""

        def cube_backward(_: SimTensor, kept: SimTensor) -> tuple[SimTensor]:  # gradient * (3 * kept ** 2)
            power = self.like(kept)
            tripled = self.like(kept)
            del power
            out = self.like(tripled)
            return (out,)

        half = self.scale(x)
        cube = [self.op((x,), x.count, x.width, cube_backward, (x,))]
        inner = [self.add(x, self.scale(cube.pop()))]
        return self.mul(half, self.shift(self.tanh(self.scale(inner.pop()))))

    def dropout(self, x: SimTensor) -> SimTensor:
        """``native_dropout``: keeps a byte for each element."""
        mask = self.empty(x.count, 1)
        return self.op((x,), x.count, x.width, lambda g, _: (self.like(g),), (mask,))

    def add(self, x: SimTensor, y: SimTensor) -> SimTensor:
        """Keeps nothing; both inputs get the same gradient, cast where their dtypes differ."""
        a, b = x.width, y.width
        return self.op((x, y), x.count, max(a, b), lambda g: (self._fit(g, a), self._fit(g, b)))

    def _fit(self, g: SimTensor, width: int) -> SimTensor:
        return g if g.width == width else self.like(g, width)

    def mul(self, x: SimTensor, y: SimTensor) -> SimTensor:
        """Keeps both factors."""

        def backward(g: SimTensor, a: SimTensor, b: SimTensor) -> tuple[SimTensor, SimTensor]:
            other = self.like(g)
            return self.like(g), other

        return self.op((x, y), x.count, x.width, backward, (x, y))

    def shift(self, x: SimTensor) -> SimTensor:
        """``x`` plus something that needs no gradient (a mask), or a copy in another layout: the gradient passes."""
        return self.op((x,), x.count, x.width, lambda g: (g,))

    def folded(self, x: SimTensor) -> SimTensor:
        """``(B, heads, T, dim)`` seen as ``(B * T, heads * dim)``: its gradient lies the other way and is copied."""
        return self.op((x,), x.count, x.width, lambda g: (self.like(g),), view=True)

    def slice(self, x: SimTensor, count: int) -> SimTensor:
        """A part of ``x``, in its memory; ``slice_backward`` fills a whole tensor of zeros."""
        whole, width = x.count, x.width
        return self.op((x,), count, width, lambda g: (self.empty(whole, width),), view=True)

    def split(self, x: SimTensor, counts: tuple[int, ...]) -> list[SimTensor]:
        """Parts in the memory of ``x``; their gradients are put together in one new tensor."""
        whole, width = x.count, x.width
        parts = [self.op((x,), counts[0], width, lambda g: (self.empty(whole, width),), view=True)]
        return parts + [self.op((x,), count, width, lambda g: (None,), view=True) for count in counts[1:]]

    def join(self, x: SimTensor, y: SimTensor) -> SimTensor:
        """A concatenation: the gradients are parts of its own."""

        def backward(g: SimTensor, a: int = x.count, b: int = y.count) -> tuple[SimTensor, SimTensor]:
            return SimTensor(g.storage, a, g.width), SimTensor(g.storage, b, g.width)

        return self.op((x, y), x.count + y.count, x.width, backward)

    def rotate(self, x: SimTensor) -> SimTensor:
        """``x * cos + rotate_half(x) * sin``: negation, concatenation, two products, a sum; ``x`` is not kept."""
        half, width = x.count // 2, x.width

        def unrotate(g: SimTensor) -> tuple[SimTensor]:
            negated = self.empty(half, width)
            first = self.empty(2 * half, width)
            del negated
            second = self.empty(2 * half, width)
            if not self.adds_in_place:
                first = self.like(second)
            del second
            return (first,)

        def rotated(y: SimTensor) -> SimTensor:
            negated = self.empty(half, width)
            out = self.op((y,), 2 * half, width, unrotate)
            del negated
            return out

        return self.add(self.scale(x), self.scale(rotated(x)))

    # --- norms -------------------------------------------------------------------------------------------------------

    def rms_norm(self, x: SimTensor, size: int, cast_last: bool = False) -> SimTensor:
        """RMSNorm in Python: float32 ``x`` and the inverse root are kept, five float32 temporaries on the way back.

        Llama casts the normed values and multiplies by the weight then; Gemma multiplies first (``cast_last``).
        """
        width = x.width
        h = self.cast(x, 4)
        rows = h.count // size
        inverse = self._inverse_root(self.scale(self._mean_square(h, rows)))
        h = self._normalize(h, inverse)
        return self.cast(self.scale(h), width) if cast_last else self.scale(self.cast(h, width))

    def layer_norm(self, x: SimTensor, size: int, upcast: bool = False) -> SimTensor:
        """One kernel: keeps ``x`` and two float32 numbers a row. OLMo's works on a float32 copy (``upcast``)."""
        width = x.width
        if upcast:
            x = self.cast(x, 4)
        numbers = self.empty(2 * (x.count // size), 4)
        out = self.op((x,), x.count, x.width, lambda g, *_: (self.like(g),), (x, numbers))
        return self.cast(out, width)

    def _mean_square(self, h: SimTensor, rows: int) -> SimTensor:
        def power_backward(_: SimTensor, kept: SimTensor) -> tuple[SimTensor]:  # gradient * (2 * kept ** 1)
            power = self.like(kept)
            doubled = self.like(kept)
            del power
            out = self.like(doubled)
            return (out,)

        squares = self.op((h,), h.count, 4, power_backward, (h,))
        whole = squares.count
        return self.op((squares,), rows, 4, lambda g: (self.empty(whole, 4),))

    def _inverse_root(self, mean: SimTensor) -> SimTensor:
        return self.op((mean,), mean.count, 4, lambda g, _: (self.like(g),), save_result=True)

    def _normalize(self, h: SimTensor, inverse: SimTensor) -> SimTensor:
        def backward(g: SimTensor, a: SimTensor, b: SimTensor) -> tuple[SimTensor, SimTensor]:
            product = self.like(g)  # reduced to one number a row
            reduced = self.like(b)
            del product
            return self.like(g), reduced

        return self.op((h, inverse), h.count, 4, backward, (h, inverse))

    # --- attention ---------------------------------------------------------------------------------------------------

    def repeat(self, x: SimTensor, times: int) -> SimTensor:
        """``repeat_kv``: a copy for each head; the gradient is summed back."""
        count, width = x.count, x.width
        if times == 1:
            return x
        return self.op((x,), count * times, width, lambda g: (self.empty(count, width),))

    def bmm(self, x: SimTensor, y: SimTensor, count: int) -> SimTensor:
        """A batched product: keeps both."""

        def backward(g: SimTensor, a: SimTensor, b: SimTensor) -> tuple[SimTensor, SimTensor]:
            other = self.matmul(b.count, b.width)
            return self.matmul(a.count, a.width), other

        out = self.op((x, y), count, x.width, backward, (x, y))
        self.workspace()
        return out

    def softmax(self, x: SimTensor, is_half: bool, upcast: bool = True) -> SimTensor:
        """``softmax(x, dtype=float32)``: keeps its float32 result, and on the way back makes ``gradient * result``."""
        if upcast and not (self.fused_softmax and is_half):
            x = self.cast(x, 4)
        width = x.width

        def backward(g: SimTensor, result: SimTensor) -> tuple[SimTensor]:
            out = self.like(g, width)
            if self.softmax_scratch:
                self.like(g)
            return (out,)

        return self.op((x,), x.count, 4 if upcast else width, backward, save_result=True)

    def efficient_attention(self, q: SimTensor, k: SimTensor, v: SimTensor, rows: int) -> SimTensor:
        """``_scaled_dot_product_efficient_attention``: keeps q, k, v, its result and a float32 number a row.

        The way back makes three gradients, a float32 number a row, and in 16 bits a float32 sum for q's gradient.
        """
        sums = self.empty(rows, 4)

        def backward(g: SimTensor, *kept: SimTensor) -> tuple[SimTensor, ...]:
            grads = tuple([self.like(x) for x in kept[:3]])
            delta = self.like(kept[3])
            if kept[0].width == 2:
                self.like(kept[0], 4)
            del delta
            return grads

        return self.op((q, k, v), q.count, q.width, backward, (q, k, v, sums), save_result=True)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def cross_entropy(self, logits: SimTensor) -> SimTensor:
        """``ForCausalLMLoss``: float32 logits, ``log_softmax`` (keeps its result), ``nll_loss`` (a whole gradient).

        So a float32 copy of all logits is alive for the log-probabilities and, when the gradient of ``log_softmax`` is
        made, one each for the gradient of ``nll_loss`` and for the result, beside the logits that the caller holds.
        """
        whole = logits.count
        logits = self.cast(logits, 4)
        logps = self.op((logits,), whole, 4, lambda g, _: (self.like(g),), save_result=True)
        return self.op((logps,), 1, 4, lambda g, _: (self.empty(whole, 4),), (logps,))
