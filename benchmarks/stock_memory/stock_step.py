"""A training step of a stock transformers model with peft adapters, on tensors that are only sizes.

The methods stand as the models' code stands in transformers 5 (``modeling_llama.py`` and its likes), so that they hold
what that code holds: the layers of peft and bitsandbytes, the norms, attention in both forms, the loss.
"""

from collections.abc import Iterator
from typing import Any

from stock_memory.allocator import CachingAllocator
from stock_memory.simulated import SimTensor
from stock_memory.simulated_linears import Linears
from stock_memory.stock_run import StockRun

from lowmem_rlhf.errors import UserError

EIGHT_BIT_FROM = 4096  # elements: bitsandbytes keeps the states of smaller parameters in float32
EIGHT_BIT_BLOCK = 256
CAST_LAST = {"gemma", "gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3"}  # norms multiply by their weight in float32
UPCAST_LAYER_NORM = {"olmo"}  # works on a float32 copy
DROPOUTS = {"gpt2": ("embedding", "scores", "residual"), "opt": ("residual",)}  # of the published configurations


class StockStep(Linears):
    """The model and its optimizer; `forward`, `backward_from` and `optimizer_step` are one step."""

    def __init__(self, run: StockRun, allocator: CachingAllocator) -> None:
        """Make a model without weights: `stock.load` gives it some."""
        super().__init__(allocator)
        self.run, self.sizes = run, run.dimensions
        self.linears = run.linears()
        names = list(self.linears)
        first = 3 if "q_proj" in self.linears else 1  # or query, key and value in one
        self.qkv, self.out, self.mlp = names[:first], names[first], names[first + 1 :]
        self.eager = run.attention == "eager" or self.sizes.attention_softcap is not None  # sdpa has no soft cap
        self.dropouts = DROPOUTS.get(self.sizes.model_type, ())
        self.states: list[SimTensor] = []
        self.lasting: tuple[SimTensor, ...] = ()
        self._layer = 0

    # --- the whole model ---------------------------------------------------------------------------------------------

    def forward(self) -> tuple[SimTensor, SimTensor]:
        """Return logits and loss, as ``model(input_ids, attention_mask, labels)`` does."""
        run, sizes = self.run, self.sizes
        with self.counted_as("hidden states"):
            x = self.empty(run.tokens * sizes.hidden_size, run.hidden_width)
            inside = sizes.model_type.startswith("gemma")  # the embedding's own forward multiplies
            if sizes.embedding_scale and inside:
                x = self.scale(x)
            x = self.leaf(x, "embedding")  # enable_input_require_grads
            if not sizes.rotary_dim or (sizes.embedding_scale and not inside):
                x = self.scale(x)  # plus learned positions, or times a number
        masks, positions = self._masks(), self._positions() if sizes.rotary_dim else ()
        if "embedding" in self.dropouts:
            x = self.dropout(x)
        for layer in range(sizes.num_layers):
            self._layer = layer
            x = self.checkpoint(self._call(layer), x) if run.gradient_checkpointing else self._decoder_layer(x)
        self.lasting = positions if not run.gradient_checkpointing else (*masks, *positions)  # arguments of the layers
        del masks
        with self.counted_as("logits"):
            x = self._norm(x)
            logits = self.linear(x, sizes.hidden_size, sizes.vocab_size)
            if sizes.logit_softcap is not None:
                logits = self.scale(self.tanh(self.scale(logits)))
            loss = self.cross_entropy(logits)
        return logits, loss

    def backward_from(self, loss: SimTensor) -> None:
        """Fill the gradients."""
        assert loss.node is not None
        self.backward(loss.node, self.empty(1, 4))
        self.lasting = ()
        self.gradients.pop("embedding", None)

    def optimizer_step(self) -> None:
        """Make the states at the first step, and let the gradients go (``zero_grad(set_to_none=True)``)."""
        with self.counted_as("optimizer"):
            if not self.states:
                self.states = [state for master in self.masters.values() for state in self._states_of(master.count)]
            if self.run.optimizer.startswith("adamw") and "8bit" not in self.run.optimizer:
                roots = [self.like(x) for x in self.masters.values()]  # _foreach_sqrt of the second moments
                del roots
        self.gradients.clear()

    def _states_of(self, count: int) -> Iterator[SimTensor]:
        name = self.run.optimizer
        if "paged" in name or name == "sgd":  # paged states are managed memory, outside the allocator
            return
        if "adamw" not in name:
            raise UserError(f"optimizer: got {name!r}; adamw, adamw_8bit, paged_adamw_8bit and sgd are known")
        for _ in range(2):
            if "8bit" in name and count >= EIGHT_BIT_FROM:
                yield self.empty(count, 1)
                yield self.empty(-(-count // EIGHT_BIT_BLOCK), 4)
            else:
                yield self.empty(count, 4)

    def _positions(self) -> tuple[SimTensor, SimTensor]:
        """cos and sin: float32 first, then in the dtype between the layers."""
        count, width = self.run.sequence_length * self.sizes.rotary_dim, self.run.hidden_width
        frequencies = self.empty(count // 2, 4)
        angles = self.empty(count, 4)
        cos = self.scale(self.like(angles))
        sin = self.scale(self.like(angles))
        del frequencies, angles
        return self.cast(cos, width), self.cast(sin, width)

    def _masks(self) -> tuple[SimTensor, ...]:
        """An additive mask for each sequence, made from boolean ones; for sdpa none, or a boolean one for a window."""
        run, sizes, square = self.run, self.sizes, self.run.sequence_length**2
        windows = [sizes.sliding_layers > 0, sizes.sliding_layers < sizes.num_layers]  # one for each kind of layer
        if not self.eager:
            windows = [sizes.sliding_window is not None and sizes.sliding_window < run.sequence_length]
        masks = []
        for _ in range(sum(windows)):
            causal = self.empty(square, 1)
            combined = self.empty(square, 1)
            del causal
            padded = self.empty(run.batch_size * square, 1)
            del combined
            masks.append(self.empty(run.batch_size * square, run.hidden_width) if self.eager else padded)
            del padded
        return tuple(masks)

    # --- one layer ---------------------------------------------------------------------------------------------------

    def _call(self, layer: int) -> Any:
        def call(x: SimTensor) -> SimTensor:
            self._layer = layer
            return self._decoder_layer(x)

        return call

    def _decoder_layer(self, x: SimTensor) -> SimTensor:
        self.part = "layer"
        place, residual = self.sizes.norm_place, x
        if self.sizes.parallel:
            return self._parallel_layer(x)
        if place != "after":
            x = self._norm(x)
        x, _ = self._attention(x)
        x = self._dropped(x)
        if place != "before":
            x = self._norm(x)
        x = self.add(residual, x)
        residual = x
        if place != "after":
            x = self._norm(x)
        x = self._dropped(self._mlp(x))
        if place != "before":
            x = self._norm(x)
        with self.counted_as("hidden states"):
            return self.add(residual, x)

    def _parallel_layer(self, x: SimTensor) -> SimTensor:
        normed = self._norm(x)
        attended, _ = self._attention(normed)
        y = self.add(attended, self._mlp(normed if self.sizes.norms == 1 else self._norm(x)))
        with self.counted_as("hidden states"):
            return self.add(y, x)

    def _norm(self, x: SimTensor) -> SimTensor:
        kind, size = self.sizes.model_type, self.sizes.hidden_size
        if self.sizes.norm == "rms":
            return self.rms_norm(x, size, kind in CAST_LAST)
        return self.layer_norm(x, size, kind in UPCAST_LAYER_NORM)

    def _dropped(self, x: SimTensor) -> SimTensor:
        return self.dropout(x) if "residual" in self.dropouts else x

    def _mlp(self, x: SimTensor) -> SimTensor:
        if not self.sizes.gated:
            first, second = self.mlp
            activate = {"gelu_new": self.gelu_new, "relu": self.tanh}.get(self.sizes.activation, self.activate)
            return self._linear(activate(self._linear(x, first)), second)
        *gates, down = self.mlp
        if len(gates) == 1:
            both = self._linear(x, gates[0])
            gate, up = self.slice(both, both.count // 2), self.slice(both, both.count // 2)
            up = self.mul(up, self.activate(gate))
            return self._linear(up, down)
        return self._linear(self.mul(self.activate(self._linear(x, gates[0])), self._linear(x, gates[1])), down)

    def _attention(self, x: SimTensor) -> tuple[SimTensor, SimTensor | None]:
        q, k, v = self._heads(x)
        q, k = self._rotated(q), self._rotated(k)
        out, scores = self._eager(q, k, v) if self.eager else (self._sdpa(q, k, v), None)
        return self._linear(out, self.out), scores

    def _heads(self, x: SimTensor) -> tuple[SimTensor, SimTensor, SimTensor]:
        sizes, rows = self.sizes, self.run.tokens
        if len(self.qkv) == 3:
            q, k, v = (self._linear(x, name) for name in self.qkv)
        else:
            queries, keys = rows * sizes.num_heads * sizes.head_dim, rows * sizes.num_kv_heads * sizes.head_dim
            qkv = self._linear(x, self.qkv[0])
            if self.qkv[0] == "qkv_proj":
                q, k, v = self.slice(qkv, queries), self.slice(qkv, keys), self.slice(qkv, keys)
            else:
                q, k, v = self.split(qkv, (queries, keys, keys))
        if sizes.qk_norm != "none":
            q, k = self._head_norm(q, sizes.num_heads), self._head_norm(k, sizes.num_kv_heads)
        return self.folded(q), self.folded(k), self.folded(v)

    def _head_norm(self, x: SimTensor, heads: int) -> SimTensor:
        size = self.sizes.head_dim * (heads if self.sizes.qk_norm == "all" else 1)
        return self.rms_norm(x, size, self.sizes.model_type in CAST_LAST)

    def _rotated(self, x: SimTensor) -> SimTensor:
        turned = x.count * self.sizes.rotary_dim // self.sizes.head_dim
        if turned in (0, x.count) and self.sizes.model_type != "phi3":  # Phi-3 cuts and joins even then
            return self.rotate(x) if turned else x
        first, passed = self.slice(x, turned), self.slice(x, x.count - turned)
        return self.join(self.rotate(first), passed)

    def _sdpa(self, q: SimTensor, k: SimTensor, v: SimTensor) -> SimTensor:
        run, groups = self.run, self.sizes.num_heads // self.sizes.num_kv_heads
        k, v = self.repeat(k, groups), self.repeat(v, groups)
        rows = run.batch_size * self.sizes.num_heads * (-(-run.sequence_length // 32) * 32)
        return self.efficient_attention(q, k, v, rows)

    def _eager(self, q: SimTensor, k: SimTensor, v: SimTensor) -> tuple[SimTensor, SimTensor]:
        run, sizes = self.run, self.sizes
        groups, several = sizes.num_heads // sizes.num_kv_heads, run.batch_size > 1
        keys, values = self.repeat(k, groups), self.repeat(v, groups)
        count = run.batch_size * sizes.num_heads * run.sequence_length**2

        def one_batch(y: SimTensor, contiguous: bool) -> SimTensor:
            """``(B, heads, T, dim)`` as ``(B * heads, T, dim)``: a copy unless it already lies so."""
            return self.shift(y) if several and not contiguous else y

        scores = self.scale(self.bmm(one_batch(q, False), one_batch(keys, groups > 1), count))
        if sizes.attention_softcap is not None:
            scores = self.scale(scores)
            scores = self.tanh(scores)
            scores = self.scale(scores)
        scores = self.shift(scores)
        scores = self.cast(self.softmax(scores, run.precision == "float16", sizes.model_type != "gpt2"), q.width)
        if "scores" in self.dropouts:
            scores = self.dropout(scores)
        out = self.bmm(scores, one_batch(values, groups > 1), q.count)
        if several:
            out = self.folded(out)
        return self.shift(out), scores

    def _linear(self, x: SimTensor, name: str) -> SimTensor:
        """A layer and, where it has one, its adapter, as peft's ``Linear``, ``Linear4bit`` and ``Linear8bitLt`` do."""
        kind, linear = self.run.quantization, self.linears[name]
        if kind == "none":
            result = self.linear(x, linear.inputs, linear.outputs)
        elif kind == "nf4":
            result = self.linear_4bit(
                x, linear.inputs, linear.outputs, self.run.compute_width, self.run.double_quantization
            )
        else:
            result = self.linear_8bit(x, linear.inputs, linear.outputs)
        if (self._layer, name, "A") not in self.masters:
            return result
        width = result.width
        if kind == "nf4":
            result = self.shift(result)  # "defensively clone"
        x = self.cast(x, 4)
        delta = self.scale(self._delta(x, name))
        if kind != "none":
            delta = self.cast(delta, width)
        result = self.add(result, delta)
        del delta
        return self.cast(result, width)

    def _delta(self, x: SimTensor, name: str) -> SimTensor:
        linear, layer, r = self.linears[name], self._layer, self.run.r
        low = self.trained(x, linear.inputs, r, (layer, name, "A"))
        return self.trained(low, r, linear.outputs, (layer, name, "B"))
