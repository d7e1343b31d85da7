"""The kernels of whole passes: packed ones without and with gradients, a decoded token, an optimizer step.

Letters as in `layers`; V vocabulary, K positions and C entries of a logits tile.
"""

from collections.abc import Callable
from functools import partial

from lowmem_rlhf.planning.limits import LOOK, tile_shape
from lowmem_rlhf.planning.memory.layers import Layer
from lowmem_rlhf.planning.memory.resident import Memory, recomputed_layers
from lowmem_rlhf.planning.shapes import PackedShape, reference_adapters
from lowmem_rlhf.planning.time.layers import ABSMAX, LayerWork, Weights, weights_of
from lowmem_rlhf.planning.time.rates import Rates
from lowmem_rlhf.planning.time.work import Work

POSITION_KERNELS = 9  # cosines and sines of a pass
MASK_KERNELS = 5  # of completions of one length
TILE_KERNELS = 14  # of a tile without gradients: its logits, the targets', the sum of the exponentials
JOINED_KERNELS = 6  # that move the sums to the largest logit, in each tile but the first
TILE_BACK_KERNELS, JOINED_BACK_KERNELS = 5, 4  # what entropy and the gradient's mean row add to both
LOSS_KERNELS = 59  # of a loss and its way back to log-probs, each over a number a token
ADAMW_KERNELS = 12  # torch's multi-tensor AdamW and the norm of the gradients, for each hundred tensors
ADAMW_BYTES = 84  # that these move of an fp32 number, its gradient and two moments
TENSORS_AT_ONCE = 100
DRAWN_KERNELS = 10  # of a decoded token behind the head
MIXING_PASSES = 8  # over the stacked factors: stacking them, QR and its Q, the products back
MIXING_KERNELS = 12  # for each column: reflections of both factors, once more for their Q, and the SVD's
LOOK_KERNELS = 3  # of a look of the host at what was decoded


class Passes:
    """The passes of one run with given settings.

    Args:
        memory: what is known of the run's memory, with its dimensions, recipe and settings.
        rates: of the device.
    """

    def __init__(self, memory: Memory, rates: Rates) -> None:
        self.memory, self.rates = memory, rates
        self.dims, self.b = memory.dims, memory.width

    def score(self, shape: PackedShape, adapters: int, language: bool = True) -> Work:
        """Return a pass without gradients over a packed row, with log-probs or with one number a position."""
        work = self._forward(shape, adapters)
        self._head(work, shape, language, gradient=False)
        return work

    def prefill(self, shape: PackedShape) -> Work:
        """Return a pass over prompts whose keys are kept."""
        work = self._forward(shape, 1)
        work.move(4 * shape.tokens * sum(2 * one.keys for one in self._layers(shape, 1)) * self.b / 2, 2)
        return work

    def update(self, shape: PackedShape, adapters: int, language: bool = True) -> Work:
        """Return a pass over a packed row and the pass back, with recomputed layers."""
        work = self._forward(shape, adapters)
        self._head(work, shape, language, gradient=True)
        hidden, b = self.dims.hidden_size, self.b
        work.move(40 * shape.scored, LOSS_KERNELS + shape.rows)
        # back to the scored states, to all states, and through the last norm
        work.move(shape.scored * hidden * (b + 4 + 4 + b), 2)
        work.move(shape.scored * hidden * b + 4 * shape.tokens * hidden * b, 3)
        self._each(work, shape, adapters, lambda layer: layer.norm_gradient(1), only=slice(1))
        first = self.memory.beside.first  # the backward pass ends there
        count = max(first, recomputed_layers(self.dims, self.memory.settings.gradient_checkpointing))
        if self.memory.settings.offload_checkpoints:
            work.fetch(2 * (count - first) * shape.tokens * hidden * b)
        self._each(work, shape, adapters, lambda layer: layer.again(), only=slice(first, count))
        self._each(work, shape, adapters, lambda layer: layer.backward(), only=slice(first + 1, None))
        self._each(work, shape, adapters, lambda layer: layer.backward(first=True), only=slice(first, first + 1))
        return work

    def token(self, rows: int, seen: int) -> Work:
        """Return the decoding of one token of so many rows, each of which sees so many positions."""
        work, dims, b = Work(self.rates), self.dims, self.b
        shape = PackedShape(rows, rows, 0, 0, 0, 0, 1, 0, 0)
        self._each(work, shape, 1, lambda layer: layer.decode(rows, seen))
        hidden, vocabulary = dims.hidden_size, dims.vocab_size
        work.move(rows * (2 * hidden + 4 * dims.rotary_dim) * b, 2)  # positions, and the embedding
        work.move((2 * rows + 1) * hidden * b, 1)  # the last norm
        work.product(rows, hidden, vocabulary, b)
        generation = self.memory.recipe.generation
        logits = rows * vocabulary
        work.move(logits * (b + 4 + 8 + 8 + 8 + 4), DRAWN_KERNELS + 1)
        if generation.temperature != 1.0:
            work.move(8 * logits, 1)
        if generation.top_k or generation.top_p < 1 or generation.min_p:
            work.move(60 * logits, 12)
        if generation.repetition_penalty != 1.0:  # fp32, times and over the penalty, which of the two, and if seen
            work.move((b + 4 + 8 + 8 + 5 + 13 + 13 + 8) * logits, 9)
        if generation.min_new_tokens:  # which stops are hidden, and what is left relative to its largest
            work.move((2 + 9 + 4 + 8) * logits, 5)
        work.move(0, LOOK_KERNELS / LOOK)
        return work

    def optimizer(self) -> Work:
        """Return an optimizer step, and the copies of the adapters in b that the passes behind it make."""
        memory, work = self.memory, Work(self.rates)
        parameters, tensors = memory.one_adapter * memory.trained, memory.beside.matrices * memory.trained
        work.move(ADAMW_BYTES * parameters, ADAMW_KERNELS * (1 + tensors / TENSORS_AT_ONCE))
        work.move(3 * (4 + self.b) * parameters, 3 * tensors)
        return work

    def mixing(self) -> Work:
        """Return the mixing of the policy into a reference that follows it, with its product cut to its rank.

        Of each adapted linear layer: two QR of stacked factors (m, n), ``4 m n^2`` FLOPs each with their Q, the SVD of
        the (n, n) matrix between them, about ``20 n^3`` (Golub and Van Loan), and two products back.
        """
        work, times = Work(self.rates), reference_adapters(self.memory.recipe)
        rank = max(map(max, self.memory.beside.ranks))
        n, kept = (times + 1) * rank, times * rank
        for linear, many in self.memory.beside.linears:
            rows = linear.inputs + linear.outputs
            flops = 4 * rows * n**2 + 22 * n**3 + 2 * rows * n * kept
            work.multiply(many * flops, 4, many * MIXING_PASSES * 4 * rows * n, kernels=many * MIXING_KERNELS * n)
        return work

    def copy(self) -> Work:
        """Return the making of a copy in b of the NF4 weights that have adapters, for a rollout."""
        work = Work(self.rates)
        for linear, many in self.memory.beside.linears:
            work.move(linear.inputs * linear.outputs * many * (0.5 + ABSMAX + self.b), 3 * many)
        return work

    # parts of these

    def _layers(self, shape: PackedShape, adapters: int) -> list[Layer]:
        return self.memory.layers(shape, adapters)

    def _each(
        self,
        work: Work,
        shape: PackedShape,
        adapters: int,
        act: Callable[[LayerWork], None],
        only: slice | None = None,
    ) -> None:
        """Add what each layer does, or each of some; those that are alike are counted once."""
        weights: Weights = weights_of(self.memory, adapters)
        counts: dict[int, tuple[Layer, int]] = {}
        for layer in self._layers(shape, adapters)[only or slice(None)]:
            counts[id(layer)] = (layer, counts.get(id(layer), (layer, 0))[1] + 1)
        for layer, count in counts.values():
            one = Work(self.rates)
            act(LayerWork(one, layer, weights, buckets_of(shape)))
            work.add(one, count)

    def _forward(self, shape: PackedShape, adapters: int) -> Work:
        """Embedding, layers, the last norm, and what all layers share."""
        work, dims, b = Work(self.rates), self.dims, self.b
        hidden, tokens = dims.hidden_size, shape.tokens
        work.move(2 * tokens * hidden * b + 8 * tokens, 1)
        if dims.embedding_scale:
            work.move(2 * tokens * hidden * b, 1)
        if dims.rotary_dim:
            work.move(tokens * dims.rotary_dim * (40 + 4 * b), POSITION_KERNELS)
        else:
            work.move(5 * tokens * hidden * b, 2)
        if shape.attended:
            work.move(shape.row_scores * (4 + 4 * b), MASK_KERNELS * buckets_of(shape))
        self._each(work, shape, adapters, lambda layer: layer.forward())
        self._each(work, shape, adapters, lambda layer: layer.norm(), only=slice(1))
        return work

    def _head(self, work: Work, shape: PackedShape, language: bool, gradient: bool) -> None:
        """Log-probs tile by tile, or one number a position."""
        scored, hidden, vocabulary, b = shape.scored, self.dims.hidden_size, self.dims.vocab_size, self.b
        if not scored:
            return
        work.move((2 * scored * hidden) * b, 1)
        if not language:
            work.move(scored * hidden * (b + 8) * (3 if gradient else 1), 6 if gradient else 2)
            return
        tile = self.memory.settings.logits_tile_tokens
        rows, entries = tile_shape(scored, tile, vocabulary, self.memory.on_cpu)
        parts, chunks = -(-scored // rows), -(-vocabulary // entries)
        add = partial(work.multiply, 2 * scored * hidden * vocabulary, b)
        product = (chunks * scored * hidden + parts * hidden * vocabulary + scored * vocabulary) * b
        logits = scored * vocabulary
        # the product; to fp32, the largest, less that, exponentials, their sum
        add(product, kernels=parts * chunks)
        work.move(logits * (b + 4 + 4 + 8 + 8 + 4), (TILE_KERNELS - 1) * parts * chunks)
        work.move(0, JOINED_KERNELS * parts * (chunks - 1) + 5 * parts + 1)
        if self.dims.logit_softcap:
            work.move(24 * logits, 3 * parts * chunks)
        if gradient:
            add(product, kernels=parts * chunks)  # the mean row
            work.move(logits * (12 + 4 + 4 + b), (TILE_BACK_KERNELS - 1) * parts * chunks)
            work.move(20 * scored * hidden * (chunks - 1), JOINED_BACK_KERNELS * parts * (chunks - 1))
            work.move(scored * hidden * (b + 4 + 4 * b + 8 + 4 + 3 * b), 9 * parts)
        if gradient and self.memory.recipe.spec.entropy_gradient(self.memory.recipe):
            add(product, kernels=parts * chunks)  # the mean row under the logits' weights too
            work.move(logits * (4 + b), parts * chunks)
            work.move(scored * hidden * (12 * (chunks - 1) + 4 * 8 + 3 * b + 12), 5 * parts * chunks + 3)


def buckets_of(shape: PackedShape) -> int:
    """Return the attention calls of a packed row: prompts of one length share one, and lengths are taken to differ."""
    return max(1, round(shape.prompt_tokens / shape.prompt_keys)) if shape.prompt_keys > 1 else 1
