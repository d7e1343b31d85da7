"""The kernels of one decoder layer: in a packed pass, in the pass back through it, and for a decoded token.

Read from our own passes (`engine.grouped_lora`, `engine.fused`, `engine.attention`, `rollout.slots`) and stock modules;
`benchmarks/phase_counts.py` holds every term against what a card starts. Letters: T tokens, h hidden size, R the sum of
the ranks of layers that share an input, b bytes of a number; the numbers of a tensor times b are its bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem_rlhf.architecture.families.block import Linear
from lowmem_rlhf.planning.memory.layers import Layer
from lowmem_rlhf.planning.memory.mixers import MixerLayer
from lowmem_rlhf.planning.memory.resident import EXPERT_BYTES, Memory
from lowmem_rlhf.planning.memory.rollout import JOINED
from lowmem_rlhf.planning.time.work import Work

ABSMAX = 17 / 64  # bytes a weight of making the scales of doubly quantized NF4 again: read codes, write, add, read
INT8_KERNELS = 8  # of LLM.int8: rounding inputs, looking for outliers, both products and their sum
PLAIN_KERNELS = 3  # that a stock layer has for a token more than one with Llama's parts, besides turning apart
LLAMAS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
MIXER_KERNELS = 60  # of a recurrence in plain torch, in one direction


@dataclass(frozen=True)
class Weights:
    """How the linear layers of a base are multiplied.

    Attributes:
        quantization: ``nf4``, ``int8`` or ``none``.
        width: b.
        adapters: of the role.
        joined: while decoding, NF4 weights of layers with one input are one product.
        everywhere: all linear layers of all layers have adapters.
        dense: while decoding, a copy in b of all NF4 weights that have adapters is multiplied.
        experts_away: experts lie in host memory, and each is fetched for its product.
        four_bit_rows: as in `hardware.capabilities`.
    """

    quantization: str
    width: int
    adapters: int
    everywhere: bool = True
    joined: bool = False
    dense: bool = False
    experts_away: bool = False
    four_bit_rows: int = 64

    def ranks(self, linears: Sequence["RankedLinear"]) -> int:
        """Return R of layers that share an input."""
        return self.adapters * sum(linear.rank for linear in linears)


@dataclass(frozen=True)
class RankedLinear(Linear):
    """A linear layer, and the rank of an adapter beside it; 0: it has none."""

    rank: int = 0


def weights_of(memory: Memory, adapters: int) -> Weights:
    """Return how the weights of a run are multiplied in a role with so many adapters."""
    settings = memory.settings
    return Weights(
        settings.quantization,
        memory.width,
        adapters,
        everywhere=memory.beside.everywhere,
        joined=settings.rollout_weights == "joined",
        dense=settings.rollout_weights == "dequantized",
        experts_away=settings.offload_experts,
        four_bit_rows=memory.capabilities.four_bit_rows,
    )


def groups_of(layer: Layer) -> list[list[RankedLinear]]:
    """Return the linear layers of a decoder layer, those that share an input together."""
    groups: dict[str, list[RankedLinear]] = {}
    for place, (linear, rank) in enumerate(zip(layer.dims.linears, layer.beside, strict=True)):
        if layer.reuses_keys and linear.name in ("k_proj", "v_proj"):
            continue
        groups.setdefault(JOINED.get(linear.name, str(place)), []).append(_of_layer(linear, rank, layer))
    return list(groups.values())


def _of_layer(linear: Linear, rank: int, layer: Layer) -> RankedLinear:
    """Return a linear layer in the size that it has where layers differ."""
    if not layer.dims.layer_sizes:
        return RankedLinear(linear.name, linear.inputs, linear.outputs, linear.bias, rank)
    inner = layer.dims.intermediate_size
    outputs = {
        "q_proj": layer.queries,
        "k_proj": layer.keys,
        "v_proj": layer.keys,
        "gate_proj": inner,
        "up_proj": inner,
    }
    inputs = {"o_proj": layer.queries, "down_proj": inner}
    return RankedLinear(
        linear.name,
        inputs.get(linear.name, linear.inputs),
        outputs.get(linear.name, linear.outputs),
        linear.bias,
        rank,
    )


def _four_parts(groups: list[list[RankedLinear]]) -> list[list[RankedLinear]]:
    """Return the groups of a layer, with an empty one for each part that it has not (experts alone have no MLP)."""
    return [*groups, *[[] for _ in range(3 - len(groups))]]


class LayerWork:
    """Adds the kernels of a layer to some work.

    Args:
        work: that grows.
        layer: in the packed pass, or whose tokens are decoded.
        weights: how its linear layers are multiplied.
        buckets: attention calls of prompts, and as many of completions: prompts of one length share one.
    """

    def __init__(self, work: Work, layer: Layer, weights: Weights, buckets: int = 1) -> None:
        self.work, self.layer, self.weights, self.buckets = work, layer, weights, buckets
        self.b, self.tokens = weights.width, layer.shape.tokens
        # what shares the layer's input, attention's output product, what shares the MLP's input, its last product
        self.qkv, self.out, *self.inner_products, self.down = _four_parts(groups_of(layer))
        self.queries, self.keys, self.inner = layer.queries, layer.keys, layer.inner
        self.hidden = layer.dims.hidden_size

    # forward

    def forward(self) -> None:
        """The whole layer, without gradients or with them."""
        self.attention_half()
        self.mlp_half(last=True)

    def again(self) -> None:
        """What a recomputed layer computes again: all but the last product, where no norm follows it."""
        self.attention_half()
        self.mlp_half(last=self.layer.dims.norm_place != "before")

    def attention_half(self) -> None:
        """Norm, products, attention, output and its sum with the stream."""
        self.norm()
        self._products(self.qkv, self.tokens)
        if isinstance(self.layer, MixerLayer):
            self._mix(self.layer)
        else:
            self._head_norms()
            self._rotate()
            self._attend()
        self._products(self.out, self.tokens)
        self._add()

    def mlp_half(self, last: bool) -> None:
        """Norm, products, activation, and with ``last`` the last product and its sum with the stream."""
        self.norm(self.later_norms)
        for group in self.inner_products:
            self._products(group, self.tokens)
        self._activate()
        self._experts(1)
        if last:
            self._products(self.down, self.tokens)
            self._add()
        elif ranks := self.weights.ranks(self.down):
            self.work.product(self.tokens, self.down[0].inputs, ranks, self.b)

    @property
    def later_norms(self) -> int:
        """Norms of the layer behind its first one."""
        return max(0, self.layer.block.norms - 1)

    def norm(self, times: int = 1) -> None:
        """RMSNorm or LayerNorm: one kernel; with fp32 weights (Gemma) three."""
        numbers = self.tokens * self.hidden
        if self.layer.block.wide_norms:
            self.work.move(times * numbers * (12 + 2 * self.b + 4), 3 * times)
        else:
            self.work.move(times * ((2 * numbers + self.hidden) * self.b + 4 * self.tokens), times)

    def _head_norms(self) -> None:
        for numbers in self._normed_heads():
            self.work.move((2 * self.tokens * numbers + self.layer.dims.head_dim) * self.b, 1)

    def _normed_heads(self) -> list[int]:
        if self.layer.block.qk_norm == "none":
            return []
        return [
            self.queries,
            *([] if self.layer.reuses_keys else [self.keys] * (2 if self.layer.block.value_norm else 1)),
        ]

    def _products(self, linears: Sequence[RankedLinear], rows: float) -> None:
        """The products of layers that share an input: x A^T of all, each weight, and each B added."""
        if not linears:
            return
        weights, ranks = self.weights, self.weights.ranks(linears)
        if ranks:
            self.work.product(rows, linears[0].inputs, ranks, self.b)
        for linear in linears:
            self._weight(linear, rows)
            if rank := weights.ranks([linear]):
                self.work.product(rows, rank, linear.outputs, self.b, adds=True)

    def _weight(self, linear: Linear, rows: float, quantization: str | None = None) -> None:
        numbers, moved = linear.inputs * linear.outputs, rows * (linear.inputs + linear.outputs) * self.b
        flops, kind = 2 * rows * numbers, quantization or self.weights.quantization
        if kind == "nf4":
            dense = 0 if rows <= self.weights.four_bit_rows else 2 * numbers * self.b
            self.work.multiply(flops, self.b, moved + numbers * (0.5 + 1 / 64) + 1024 + dense)
        elif kind == "int8":
            rounded = rows * (linear.inputs + 8 * linear.outputs)  # int8 inputs, written and read; int32 results
            self.work.multiply(flops, self.b, moved + numbers + rounded, kernels=INT8_KERNELS)
        else:
            self.work.multiply(flops, self.b, moved + numbers * self.b)
        if linear.bias:
            self.work.move(linear.outputs * self.b, 0)

    def _rotate(self) -> None:
        """Rotary positions of queries and keys: each times cosines, turned, times sines, and their sum."""
        dims = self.layer.dims
        if not dims.rotary_dim:
            return
        share, tables = dims.rotary_dim / dims.head_dim, 2 * self.tokens * dims.rotary_dim * self.b
        for numbers in (self.queries, *([] if self.layer.reuses_keys else [self.keys])):
            self.work.move(10 * share * self.tokens * numbers * self.b + tables, 5)
            if share < 1:
                self.work.move(2 * self.tokens * numbers * self.b, 1)

    def _attend(self) -> None:
        """Prompts to themselves; completions to the prompt that is put before each, and to themselves."""
        shape, b, calls, work = self.layer.shape, self.b, self.buckets, self.work
        if self.layer.grouped and not self.layer.capped:  # heads of keys and values are repeated
            work.move(4 * shape.prompt_tokens * self.queries * b, 2 * calls)
        self._sdpa(shape.prompt_tokens, shape.prompt_tokens, shape.prompt_scores / 2, calls)
        if shape.attended:
            work.move(4 * shape.attended * self.keys * b, 2 * calls)
            if self.layer.grouped and not self.layer.capped:
                work.move(4 * shape.attended * self.queries * b, 2 * calls)
            self._sdpa(shape.own_tokens, shape.attended, shape.own_scores, calls)
            work.move(2 * shape.own_tokens * self.queries * b, calls)  # heads beside each other
            work.move(2 * self.tokens * self.queries * b, 1)  # both parts
        if calls > 1:
            work.move(2 * shape.prompt_tokens * self.queries * b, 0)

    def _sdpa(self, queries: float, keys: float, pairs: float, calls: int, back: float = 1) -> None:
        """Attention calls; ``back`` 2.5 and their gradient: five products in place of two (arXiv 2205.14135)."""
        moved = (2 * queries * self.queries + 2 * keys * self._attended_heads()) * self.b
        if back > 1:  # the result's gradient is read too, and those of queries, keys and values are written
            moved += 2 * (queries * self.queries + keys * self._attended_heads()) * self.b
        flops = back * 4 * self.queries * pairs
        if self.layer.capped:  # scores are written out, in fp32 several times
            heads = self.layer.dims.num_heads
            self.work.multiply(flops, self.b, moved + back * 30 * heads * pairs, kernels=10 * back * calls)
        else:
            self.work.multiply(flops, self.b, moved, attention=True, kernels=calls)

    def _attended_heads(self) -> int:
        return self.keys if self.layer.capped else self.queries

    def _mix(self, layer: MixerLayer) -> None:
        mixer = layer.mixer
        moved = 4 * self.tokens * (8 * (mixer.keys + mixer.values) + 2 * mixer.channels)
        self.work.multiply(8 * self.tokens * (mixer.keys + mixer.values) * 64, 4, moved, kernels=MIXER_KERNELS)

    def _activate(self) -> None:
        """An activation, and its product with the other half where there is a gate."""
        if not self.inner:
            return
        f = self.tokens * self.inner * self.b
        self.work.move(5 * f if self.layer.block.gated else 2 * f, 2 if self.layer.block.gated else 1)

    def _experts(self, times: float) -> None:
        """Experts one after another, each for the tokens that are routed to it."""
        if (experts := self.layer.dims.experts) is None:
            return
        rows, numbers = experts.per_token * self.tokens, 3 * experts.inner * self.hidden
        hit = min(experts.count, rows)  # at most: those that some token is routed to
        read = hit * numbers * (0.5 + 2 * self.b if self.layer.one_by_one else self.b)
        if self.weights.experts_away:
            self.work.fetch(times * hit * numbers * EXPERT_BYTES)
        moved = rows * (2 * self.hidden + 6 * experts.inner) * self.b
        self.work.multiply(times * 2 * rows * numbers, self.b, times * (read + moved), kernels=12 * times * hit)

    def _add(self) -> None:
        self.work.move(3 * self.tokens * self.hidden * self.b, 1)

    # the way back

    def backward(self, first: bool = False) -> None:
        """The gradients of the whole layer; of the ``first`` one those of its input are not needed."""
        self._gradients(self.down)
        self._experts(2)
        self._activation_gradient()
        for group in self.inner_products:
            self._gradients(group)
        self.norm_gradient(self.later_norms)
        self._add()
        self._gradients(self.out)
        if isinstance(self.layer, MixerLayer):
            self._mix(self.layer)
            self._mix(self.layer)
        else:
            self._attention_gradient()
            self._rotation_gradient()
            for numbers in self._normed_heads():
                self.work.move((3 * self.tokens * numbers + self.layer.dims.head_dim) * self.b, 1)
        self._gradients(self.qkv, of_input=not first)
        if not first:
            self.norm_gradient(1)
            self._add()

    def _gradients(self, linears: Sequence[RankedLinear], of_input: bool = True) -> None:
        """Of an input by each weight and by A, and of each A and B, added to fp32 gradients."""
        work, b, rows = self.work, self.b, self.tokens
        for place, linear in enumerate(linears if of_input else ()):
            self._dense(linear)
            work.product(rows, linear.outputs, linear.inputs, b, adds=place > 0)
        ranks = self.weights.ranks(linears)
        if not ranks:
            return
        adapted = [linear for linear in linears if linear.rank]
        for linear in adapted:
            r = self.weights.ranks([linear])
            work.product(rows, linear.outputs, r, b)
            work.product(linear.outputs, rows, r, b)
            work.move(linear.outputs * r * (b + 4 + 12), 2)  # to fp32, and added
        work.product(ranks, rows, linears[0].inputs, b)
        work.move(ranks * linears[0].inputs * (b + 4 + 12), 2 * len(adapted))
        if of_input:
            work.product(rows, ranks, linears[0].inputs, b)
            work.move(3 * rows * linears[0].inputs * b, 1)

    def _dense(self, linear: Linear) -> None:
        """A quantized weight in b."""
        numbers = linear.inputs * linear.outputs
        if self.weights.quantization == "nf4":
            self.work.move(numbers * (0.5 + self.b + ABSMAX) + 1028, 3)
        elif self.weights.quantization == "int8":
            self.work.move(numbers * (1 + 3 * self.b), 3)

    def _activation_gradient(self) -> None:
        f = self.tokens * self.inner * self.b
        self.work.move(11 * f if self.layer.block.gated else 3 * f, 4 if self.layer.block.gated else 1)

    def norm_gradient(self, times: int) -> None:
        """One kernel; with fp32 weights thirteen, in fp32 (`engine.fused`)."""
        numbers = self.tokens * self.hidden
        if self.layer.block.wide_norms:
            self.work.move(times * numbers * (68 + 5 * self.b), 13 * times)
        else:
            self.work.move(times * ((3 * numbers + self.hidden) * self.b + 4 * self.tokens), times)

    def _attention_gradient(self) -> None:
        shape, b, calls, work = self.layer.shape, self.b, self.buckets, self.work
        repeats = self.layer.grouped and not self.layer.capped
        if shape.attended:
            self._sdpa(shape.own_tokens, shape.attended, shape.own_scores, calls, back=2.5)
            if repeats:  # summed over the query heads of a key head
                work.move(2 * shape.attended * (self.queries + self.keys) * b, 2 * calls)
            rows = shape.attended - shape.own_tokens
            work.move(2 * (rows + shape.prompt_tokens) * self.keys * b, 2 * calls)  # and over a prompt's completions
            work.move(2 * shape.own_tokens * (self.queries + 2 * self.keys) * b, 3 * calls)
        self._sdpa(shape.prompt_tokens, shape.prompt_tokens, shape.prompt_scores / 2, calls, back=2.5)
        if repeats:
            work.move(2 * shape.prompt_tokens * (self.queries + self.keys) * b, 2 * calls)
        if shape.attended:
            work.move(6 * shape.prompt_tokens * self.keys * b, 2 * calls)
        if shape.attended or calls > 1:
            work.move(2 * self.tokens * (self.queries + 2 * self.keys) * b, 3)  # the parts of the row together
        work.move(2 * self.tokens * (self.queries + 2 * self.keys) * b, 3)  # as one of a batch

    def _rotation_gradient(self) -> None:
        dims = self.layer.dims
        if dims.rotary_dim:
            share, tables = dims.rotary_dim / dims.head_dim, 2 * self.tokens * dims.rotary_dim * self.b
            for numbers in (self.queries, *([] if self.layer.reuses_keys else [self.keys])):
                self.work.move(14 * share * self.tokens * numbers * self.b + tables, 7)
        if not self.layer.block.fused:
            self.work.move(2 * self.tokens * (self.queries + 2 * self.keys) * self.b, 3)  # as products have them

    # a decoded token

    def decode(self, rows: int, seen: int) -> None:
        """One token of so many rows, which see so many positions of their slots each."""
        b, work, dims = self.b, self.work, self.layer.dims
        numbers = rows * (self.queries + self.keys) * b
        self.tokens = rows
        self.norm()
        self._decoded(self.qkv, rows)
        self._head_norms()
        if self.layer.block.qk_norm != "none":
            work.move(2 * numbers, 1)  # side by side
        if dims.rotary_dim and self.decodes_fast:
            work.move(7 * numbers + 2 * rows * dims.rotary_dim * b, 3)
        elif dims.rotary_dim and not isinstance(self.layer, MixerLayer):
            self._rotate()
            work.move(2 * numbers, PLAIN_KERNELS)
        if not isinstance(self.layer, MixerLayer):
            work.move(4 * rows * self.keys * b, 2)
            flops, moved = 4 * rows * seen * self.queries, rows * (2 * seen * self.keys + 2 * self.queries + seen) * b
            work.multiply(flops, b, moved, attention=True, kernels=10 if self.layer.capped else 1)
        else:
            work.move(8 * rows * self.layer.mixer.state, MIXER_KERNELS / 4)
        self._decoded(self.out, rows)
        self._add()
        self.norm(self.later_norms)
        for group in self.inner_products:
            self._decoded(group, rows)
        self._activate()
        self._experts(1)
        self._decoded(self.down, rows)
        self._add()

    @property
    def decodes_fast(self) -> bool:
        """Whether queries and keys are turned together (`engine.decode.fast_decoder`): a layer has Llama's parts."""
        layer = self.layer
        alike = layer.block.norms == 2 and layer.dims.norm_place == "before" and not layer.block.fused
        names = {linear.name for linear in layer.dims.linears}
        return alike and names == LLAMAS and self.weights.everywhere and not isinstance(layer, MixerLayer)

    def _decoded(self, linears: Sequence[RankedLinear], rows: int) -> None:
        """Layers that share an input as one product, where their weights lie together; else as in other passes.

        Only those with adapters do.
        """
        weights = self.weights
        mine = [linear for linear in linears if linear.rank]
        self._products([linear for linear in linears if not linear.rank], rows)
        if not mine or not (weights.dense or (weights.joined and len(mine) > 1)):
            self._products(mine, rows)
            if len(mine) == 3 and not weights.dense:
                self.work.move(2 * rows * sum(x.outputs for x in mine) * self.b, 1)  # side by side
            return
        outputs, ranks = sum(linear.outputs for linear in mine), weights.ranks(mine)
        whole = replace(mine[0], outputs=outputs)
        self._weight(whole, rows, "none" if weights.dense else None)
        if not weights.dense:
            self.work.move(outputs * mine[0].inputs * 3 / 64 - 1024, 0)  # scales are fp32 there
        if ranks:
            self.work.product(rows, mine[0].inputs, ranks, self.b)
            self.work.product(rows, ranks, outputs, self.b, adds=True)
