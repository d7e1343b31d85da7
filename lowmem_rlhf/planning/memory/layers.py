"""Bytes of activations: what a layer keeps for its backward pass, and what is there at once in either direction.

Read from our own passes (`engine.grouped_lora`, `engine.fused`, `engine.attention`) and stock modules; `benchmarks/
vram_measured.py` holds every term against the live tensors of a real step. Letters: T tokens, h hidden size, nh query
heads, nkv key/value heads, d head size, f MLP size, b bytes of a compute-dtype number. Functions return bytes.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.families import family_of
from lowmem_rlhf.architecture.families.block import Block
from lowmem_rlhf.planning.limits import CAPPED_SCORES, EXPLICIT_KEYS
from lowmem_rlhf.planning.shapes import PackedShape


@dataclass(frozen=True)
class Layer:
    """One decoder layer in a packed pass.

    Attributes:
        dims, shape: of the model and of the packed row.
        width: b.
        beside: the rank of an adapter beside each of the layer's linear layers; 0: it has none.
        adapters: of the role that computes.
        dense: bytes of the largest weight where it is quantized and made dense to be multiplied, else 0.
        explicit_scores: the device takes explicit scores for short attention.
        wide: the residual stream is in fp32, and so is what is added to it (`engine.wide`).
        reuses_keys: keys and values are those of an earlier layer.
        one_by_one: experts are multiplied one after another (`engine.experts`), and not in one grouped product.
    """

    dims: ModelDimensions
    shape: PackedShape
    width: int
    beside: tuple[int, ...]
    adapters: int
    dense: int
    explicit_scores: bool
    wide: bool
    reuses_keys: bool = field(default=False, kw_only=True)
    one_by_one: bool = field(default=False, kw_only=True)

    mixes = False  # it passes a state on in place of attention

    @cached_property
    def block(self) -> Block:
        """How the layer departs from Llama's."""
        return family_of(self.dims.model_type).block or Block(gated=self.dims.gated)

    def of(self, numbers: float, tokens: int | None = None) -> int:
        """Return the bytes of so many compute-dtype numbers for each token (of all tokens, or of so many)."""
        return round(self.width * numbers * (self.shape.tokens if tokens is None else tokens))

    @property
    def ranks(self) -> int:
        """Sum of the ranks of all adapters beside the layer's linear layers in the role that computes."""
        return self.adapters * sum(self.beside)

    @property
    def queries(self) -> int:
        """Numbers of one token's queries, ``nh d``."""
        return self.dims.num_heads * self.dims.head_dim

    @property
    def keys(self) -> int:
        """Numbers of one token's keys, ``nkv d``."""
        return self.dims.num_kv_heads * self.dims.head_dim

    @property
    def grouped(self) -> bool:
        """Whether there are fewer key heads than query heads."""
        return self.dims.num_kv_heads < self.dims.num_heads

    @property
    def capped(self) -> bool:
        """Whether attention scores have a soft cap (Gemma 2), for which no SDPA kernel exists."""
        return bool(self.dims.attention_softcap)

    def explicit(self, keys: int) -> bool:
        """Whether scores over so many keys are computed outside SDPA."""
        return self.explicit_scores and not self.capped and keys <= EXPLICIT_KEYS

    @property
    def hidden(self) -> int:
        """A hidden state, ``b T h``, or in fp32: also what a recomputed layer keeps."""
        return self.of(self.stream)

    @property
    def stream(self) -> int:
        """Compute-dtype numbers that a hidden state takes: h, and twice that in fp32."""
        return self.dims.hidden_size * (2 if self.wide else 1)

    @property
    def layer_inputs(self) -> int:
        """Numbers of a token that enter all layers beside its stream (Gemma 4)."""
        return self.dims.num_layers * self.dims.layer_input * (2 if self.wide else 1)

    @property
    def inner(self) -> int:
        """Inner size of the MLP that takes all tokens; 0 where there are experts only."""
        return self.dims.experts.shared if self.dims.experts else self.dims.intermediate_size

    # what the backward pass needs

    def saved_attention(self) -> int:
        """Everything from the layer's input to the attention's output, which the output product keeps.

        The input and its norm (2h), ``x A^T`` of q, k and v, queries, keys and values as attention took them (see
        `_saved_keys`), SDPA's result and its log-sum-exp, and the joined result; norms of heads keep q and k before
        them.
        """
        elements = self.stream + self.dims.hidden_size + self.ranks / 2 + self.queries
        if self.wide:  # divided by its power of two for the output product
            elements += self.queries
        if self.block.qk_norm != "none":
            elements += self.queries + (0 if self.reuses_keys else self.keys * (2 if self.block.value_norm else 1))
        if self.block.gated_attention:  # the gate, its sigmoid, and its product with the result
            elements += 3 * self.queries
        return self.of(elements) + self._saved_queries() + self._saved_keys() + self._saved_results()

    def _saved_queries(self) -> int:
        """Queries once; once more for the part whose scores are explicit, where they are scaled first."""
        shape = self.shape
        prompts, own = self.explicit(shape.prompt_keys), self.explicit(shape.own_keys)
        stored = 0 if prompts and own else shape.tokens
        return self.of(self.queries, stored + shape.prompt_tokens * prompts + shape.own_tokens * own)

    def _saved_keys(self) -> int:
        """Keys and values: the prompts' and, with the prompt before each, the completions'.

        SDPA takes them with heads expanded to nh where there are fewer.
        """
        shape = self.shape
        expand_own = self.grouped and not self.capped and not self.explicit(shape.own_keys)
        return self._saved_prompt_keys() + self.of(2 * (self.queries if expand_own else self.keys), shape.attended)

    def _saved_prompt_keys(self) -> int:
        """The prompts' keys and values: expanded, or the whole row's where they lie in it, or a copy of them.

        Explicit products copy the parts of several prompts; not of one, nor of one token each, whose heads lie side by
        side in the row (partly rotated keys do not, nor values that one product gave with the queries). Where values
        come from one product with the queries, they keep all of it; GPT-2's queries keep it themselves in SDPA.
        """
        shape, fused, rotated = self.shape, self.block.fused, self.dims.rotary_dim
        if self.reuses_keys and not self.grouped:
            return 0
        explicit, one = self.explicit(shape.prompt_keys), shape.prompt_tokens <= shape.prompt_keys
        if self.grouped and not self.capped and not explicit:
            return self.of(2 * self.queries, shape.prompt_tokens)
        if explicit and not one and (shape.prompt_keys > 1 or fused):
            by_queries = fused and not rotated and not self.explicit(shape.own_keys)
            return self.of(2 * self.keys, None if by_queries else shape.prompt_tokens)
        if fused:
            own_queries = rotated or self.explicit(shape.own_keys)
            return self.of(2 * self.keys + (self.queries if own_queries else 0) + (self.keys if rotated else 0))
        return self.of(self.keys if explicit and not one and rotated < self.dims.head_dim else 2 * self.keys)

    def _saved_results(self) -> int:
        """SDPA's result and log-sum-exp (fp32 a head); explicit scores keep their softmax; a soft cap keeps nothing."""
        if self.capped:
            return 0
        total = 0
        for tokens, scores, keys in (
            (self.shape.prompt_tokens, self.shape.prompt_scores, self.shape.prompt_keys),
            (self.shape.own_tokens, self.shape.own_scores, self.shape.own_keys),
        ):
            if self.explicit(keys):
                total += self.of(self.dims.num_heads, scores)
            else:
                total += self.of(self.queries, tokens) + 4 * self.dims.num_heads * tokens
        return total

    def saved_mlp(self) -> int:
        """Everything from the attention's output product to the layer's output.

        Its input and norm (2h; two more where the results of attention and MLP have norms, none where both run beside
        each other), gate, up and their product (3f; one more where gate and up are one product, 2f without a gate).
        """
        h, f = self.dims.hidden_size, self.inner
        norms = {1: 0, 2: 2, 4: 4}.get(self.block.norms, 2)
        if self.dims.experts and not f:
            norms -= 1  # experts keep no input
        wide = 3 * h if self.wide else 0  # the results of attention and MLP, and their sum with the stream, in fp32
        extra = self.dims.layer_input
        # the stream once more, a gate before and after its activation, its product with the input, and the result
        entered = 3 * extra + h + self.stream if extra else 0
        return self.of(norms * h + wide + self._mlp_numbers() * f + self.ranks / 2 + entered) + self.saved_experts()

    def saved_experts(self) -> int:
        """What experts keep: the routing (fp32 of all experts, int64), each token's MLP, its result before the sum.

        One by one they keep the weighted result as well.
        """
        if (experts := self.dims.experts) is None:
            return 0
        results = (2 if self.one_by_one else 1) * self.dims.hidden_size
        routed = self.of(experts.per_token * (3 * experts.inner + results))
        return routed + (6 * experts.count + 24 * experts.per_token) * self.shape.tokens

    def _experts_at_once(self, backward: bool) -> int:
        """What experts take beside that: in one product copies of all that is routed; one by one of the largest share.

        How tokens spread over experts is not known before: twice the even share is assumed.
        """
        if (experts := self.dims.experts) is None:
            return 0
        h, f, rows = self.dims.hidden_size, experts.inner, experts.per_token * self.shape.tokens
        if self.one_by_one:
            share = min(self.shape.tokens, 2 * math.ceil(rows / experts.count))
            return self.of((3 if backward else 1) * h) + self.of(2 * h + 4 * f, share) + self.dense
        return self.of(3 * h if backward else max(4 * h, h + 4 * f), rows)

    def _mlp_numbers(self) -> int:
        if not self.block.gated:
            return 2
        return 4 if self.block.fused or self.block.keeps_gate else 3

    def saved(self) -> int:
        """All that a layer keeps that is not recomputed; its input is counted with it."""
        statistics = 8 * self.block.norms * self.shape.tokens if self.block.norm_bias else 0  # LayerNorm's, fp32
        return self.saved_attention() + self.saved_mlp() + statistics

    # what there is at once in the backward pass, of one layer

    def backward_peak(self, recomputed: bool = False) -> int:
        """The most that a layer and its gradients take: in its MLP, or in its attention."""
        inputs = self.of(2 * self.layer_inputs)  # their gradient, of one layer and added up
        return inputs + max(self.saved() + self._mlp_gradients(recomputed), self._attention_gradients())

    def _mlp_gradients(self, recomputed: bool) -> int:
        """The gradients at the last product of the MLP, with all of the layer still there.

        Of the layer's output (h, twice where a norm follows) and, twice, of the product's input (2f): by the weight and
        by the adapter. Or once, with the weight made dense. A layer is recomputed only after the gradient by the
        weight, unless a norm follows; then a weight is made dense beside it for gate and up, before what comes of them.
        """
        h, f = self.dims.hidden_size, self.inner
        dense = self.of(f) + self.dense
        if recomputed and self.dims.norm_place == "before":
            products = 2 if self.block.gated else 1
            dense -= self.of((self._mlp_numbers() - products) * f)
        h, inner = self.stream, 2
        if self.wide:  # activation, gate, up and their product in fp32, and the gradients of these
            inner = 10 if recomputed else 8
        beside = max(self.of(inner * f), dense, self._experts_at_once(backward=True))
        return self.of(2 * h if self.block.norms == 4 else h) + beside

    def _attention_gradients(self) -> int:
        """Attention's own backward pass: the MLP is gone; gradients of output, queries, expanded keys and values."""
        shape = self.shape
        held = self.saved_attention() - self.of(self.queries)  # the product behind attention is done with its result
        held += self.of(self.dims.hidden_size + self.queries)
        if self.capped:
            return held + max(self._capped_gradients(), self._capped_prompt_gradients())
        of_keys = self.queries if self.grouped and not self.explicit(shape.own_keys) else self.keys
        gradients = self.of(self.queries, shape.own_tokens) + self.of(2 * of_keys, shape.attended)
        if self.explicit(shape.own_keys):
            gradients += self.of(2 * self.dims.num_heads, shape.own_scores)
        return held + gradients

    def _capped_gradients(self) -> int:
        """Of the completions, made again in parts: scores four times in fp32, and a part's gradients."""
        shape, scores = self.shape, self._scores_at_once()
        part = min(1, scores / max(1, self.dims.num_heads * shape.own_scores))
        gradients = self.of(self.queries, shape.own_tokens) + self.of(2 * self.keys, shape.attended)
        return gradients + 16 * scores + round(part * gradients)

    def _capped_prompt_gradients(self) -> int:
        """Of the prompts, after the completions: these have freed their keys, and added to the prompts' gradients."""
        shape, scores = self.shape, self._scores_at_once(prompts=True)
        part = min(1, scores / max(1, self.dims.num_heads * shape.prompt_scores))
        own = self.of(self.queries + 2 * self.keys, shape.own_tokens) + self.of(2 * self.keys, shape.prompt_tokens)
        gradients = self.of(self.queries + 2 * self.keys, shape.prompt_tokens)
        return own + gradients + 16 * scores + round(part * gradients) - self.of(2 * self.keys, shape.attended)

    def _scores_at_once(self, prompts: bool = False) -> int:
        """Scores of capped attention at once: of as many completions (or prompts) as the bound allows, or of one."""
        heads, shape = self.dims.num_heads, self.shape
        each = shape.prompt_keys**2 if prompts else shape.row_scores
        rows = max(1, CAPPED_SCORES // max(1, heads * each))
        return heads * min(shape.prompt_scores if prompts else shape.own_scores, rows * each)

    def norm_gradients(self) -> int:
        """A norm's backward pass beside its input and gradient: three fp32 numbers (LayerNorm: one more gradient)."""
        h = self.dims.hidden_size
        return self.of(h) if self.block.norm_bias else 12 * h * self.shape.tokens

    # what there is at once in a pass without gradients

    def forward_peak(self, keeps_keys: bool = False) -> int:
        """The most that one layer of a pass without gradients takes, the embeddings included.

        Args:
            keeps_keys: its keys and values are counted elsewhere, with those of the other layers.
        """
        embeddings = self.hidden * (2 if not self.dims.rotary_dim else 1)  # of positions, too
        attention = max(self._attention_forward(), self._head_norm_forward())
        elsewhere = self.of(2 * self.keys) if keeps_keys or self.reuses_keys else 0
        return embeddings + max(self._mlp_forward(), attention - elsewhere)

    def _mlp_forward(self) -> int:
        """Input, attention's sum, its norm, the MLP's parts (3f; 2f without a gate) and result, a dense weight.

        Or, where gate and up are one product, no result and weight yet, but the activated gate as well.
        """
        h, f, parts = self.dims.hidden_size, self.inner, self._mlp_numbers()
        if self.dims.experts and not f:
            return self.of(3 * h) + self._experts_at_once(backward=False)
        if self.wide:  # the product of gate and up is made in fp32
            return self.of(8 * h) + max(self.of(3 * f) + self.dense, self.of(8 * f))
        routed = self.of(3 * h) + self._experts_at_once(backward=False)
        return max(routed, self.of(4 * h + min(parts, 3) * f) + self.dense, self.of(3 * h + parts * f))

    def _head_norm_forward(self) -> int:
        """The norm of queries: input and its norm, q, k and v, and two fp32 copies of the queries (Gemma: three)."""
        if self.block.qk_norm == "none":
            return 0
        copies = 3 if self.block.embedding_scale or self.block.wide_norms else 2  # Gemma's weights, 1 + w, are fp32
        fp32 = 4 * copies * self.queries * self.shape.tokens
        return self.of(2 * self.dims.hidden_size + self.queries + 2 * self.keys) + fp32

    def _attention_forward(self) -> int:
        """Input and norm, q, k and v, the completions' keys and values before and after their heads are expanded.

        Queries and keys of which a part is turned are there before and after (Phi).
        """
        shape, heads = self.shape, self.dims.num_heads
        total = self.of(2 * self.dims.hidden_size + self.queries + 2 * self.keys)
        if not self.block.fused and 0 < (turned := self.dims.rotary_dim) < self.dims.head_dim:
            total += self.of((self.queries + self.keys) * (1 + turned / self.dims.head_dim))
        results = self.of(self.queries)  # of both parts; joined, they are there twice
        if self.capped:
            prompts = self._scores_at_once(prompts=True) * (8 + self.width)
            own = self.of(2 * self.keys, shape.attended) + max(results, self._scores_at_once() * (8 + self.width))
            return total + results + max(prompts, own)
        total += self.of(2 * self.keys, shape.attended)
        keys, scores, tokens = shape.own_keys, shape.own_scores, shape.own_tokens
        if not shape.attended:
            keys, scores, tokens = shape.prompt_keys, shape.prompt_scores, shape.tokens
        if self.explicit(keys):  # queries are scaled first
            return total + max(2 * results, results + self.of(2 * heads, scores) + self.of(self.queries, tokens))
        expanded = self.of(2 * self.queries, shape.attended or shape.tokens) if self.grouped else 0
        return total + results + max(expanded, results if shape.attended else 0)

    def kept_keys(self, together: bool = False) -> int:
        """What a prefill pass keeps of a layer until the cache is made: the storages in which keys and values lie.

        Values lie in their own product's result, or in that of queries, keys and values together; keys do as well where
        no rotary positions turn them.
        """
        if self.reuses_keys:
            return 0
        if self.block.value_norm:  # both are results of a norm
            return self.of(2 * self.keys)
        joined = self.queries + 2 * self.keys if self.block.fused or together else self.keys
        return self.of(joined if not self.dims.rotary_dim else joined + self.keys)

    def common(self, gradient: bool = False) -> int:
        """What all layers share: cosines and sines of rotary positions, ids and positions (int64), masks.

        And what enters all layers beside the stream, with the norm before it and the embedding that it is made of where
        there are gradients; the keys and values that layers reuse are kept then, too.
        """
        shape, tables, sizes = self.shape, family_of(self.dims.model_type).rotary_tables, self.dims.layer_sizes
        turned = sum({one.head_dim for one in sizes}) if sizes else tables * self.dims.rotary_dim
        rotary = self.of(2 * turned)
        masks = shape.row_scores if shape.attended else 0
        if self.capped or self.explicit(shape.prompt_keys):
            masks += shape.prompt_keys**2
        entered = self.layer_inputs
        if gradient and entered:
            entered += self.layer_inputs + self.dims.hidden_size
        reused = {one.head_dim: one.num_kv_heads for one in sizes if one.reuses_keys} if gradient else {}
        entered += sum(2 * heads * dim for dim, heads in reused.items())
        return rotary + 16 * shape.tokens + self.width * masks + self.of(entered)
