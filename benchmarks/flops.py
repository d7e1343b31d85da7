"""What a GRPO step needs, counted from the model's sizes: FLOPs, and bytes that have to come from memory. No torch.

A product of (T, a) with (a, b) is 2 T a b FLOPs. Letters: T packed tokens, W weights in the blocks' linear layers,
A weights of the adapter (rank r on all of them), V vocabulary, H hidden size, nh query heads of dk dimensions, "pairs"
the (query, key) pairs that causal attention needs in one layer. What is elementwise (norms, rotary, softmax) counts
nothing, and attention counts only the pairs below the diagonal, without sliding windows.

    forward    linears 2 T W, adapters 2 T A, attention 4 nh dk pairs a layer (scores and values), head 2 S V H for
               S scored positions
    recompute  with checkpointing the linears, adapters and attention of every recomputed layer once more, less its
               last product, unless a norm stands behind that and needs its value
    backward   linears 2 T W: weights are frozen, so only the input's gradient; not for the first layer's queries, keys
               and values (and MLP, where it stands beside), whose input is the frozen embedding. Adapters 4 T A, both
               gradients. Attention 8 nh dk pairs a layer (values, weights, queries, keys). Head 2 S V H.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.planning.memory.resident import block_weight_bytes, recomputed_layers
from lowmem_rlhf.planning.memory.rollout import kv_bytes_per_token

QKV = {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value"}
MLP_INPUT = {"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"}
OPTIMIZER_BYTES = 28  # AdamW on fp32: weight, gradient and two moments are read, all but the gradient are written


@dataclass(frozen=True)
class Flops:
    """FLOPs by what does them; they add up."""

    linears: int = 0
    adapters: int = 0
    attention: int = 0
    head: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Tokens:
    """The tokens of a step's batch: lengths of B prompts and of their B * G completions, in order."""

    prompts: Sequence[int]
    completions: Sequence[int]

    @property
    def groups(self) -> list[tuple[int, Sequence[int]]]:
        """Each prompt's length with the lengths of its completions."""
        size = len(self.completions) // len(self.prompts)
        return [(p, self.completions[b * size : (b + 1) * size]) for b, p in enumerate(self.prompts)]

    @property
    def packed(self) -> int:
        """Tokens a pass has to feed: each prompt once, each completion without its last token."""
        return sum(self.prompts) + sum(self.completions) - len(self.completions)

    @property
    def scored(self) -> int:
        """Tokens whose log-probs are wanted."""
        return sum(self.completions)

    @property
    def pairs(self) -> int:
        """Causal (query, key) pairs of a packed pass."""
        return self.prompt_pairs + self.decode_pairs

    @property
    def prompt_pairs(self) -> int:
        """Of them those inside the prompts, which prefilling has to compute."""
        return sum(causal_pairs(p) for p in self.prompts)

    @property
    def decode_pairs(self) -> int:
        """Of them those of the completions' queries: with the whole prompt, and causally with themselves."""
        return sum((n - 1) * p + causal_pairs(n - 1) for p, members in self.groups for n in members)


def causal_pairs(tokens: int) -> int:
    """Return the (query, key) pairs of a sequence in which a token sees itself and what stands before it."""
    return tokens * (tokens + 1) // 2


def forward(dims: ModelDimensions, rank: int, tokens: int, pairs: int, scored: int) -> Flops:
    """Return the FLOPs of a pass without gradients; ``rank`` 0: without adapters (the reference)."""
    adapters = dims.lora_parameters(rank) if rank else 0
    return Flops(
        linears=2 * tokens * dims.linear_parameters,
        adapters=2 * tokens * adapters,
        attention=4 * dims.num_layers * dims.num_heads * dims.head_dim * pairs,
        head=2 * scored * dims.vocab_size * dims.hidden_size,
    )


def recomputed(dims: ModelDimensions, rank: int, tokens: int, pairs: int, checkpointing: bool | int) -> Flops:
    """Return the FLOPs that the backward pass spends on what the forward pass did not keep."""
    once, layers = forward(dims, rank, tokens, pairs, 0), recomputed_layers(dims, checkpointing)
    last = dims.linears[-1]
    skipped = 0 if dims.norm_place != "before" else layers * 2 * tokens * last.outputs
    linears, adapters, attention = (
        layers * part // dims.num_layers for part in (once.linears, once.adapters, once.attention)
    )
    return Flops(linears - skipped * last.inputs, adapters - skipped * rank, attention)


def backward(dims: ModelDimensions, rank: int, tokens: int, pairs: int, scored: int) -> Flops:
    """Return the FLOPs of the gradients: of all inputs but the embedding, and of the adapter's weights."""
    once = forward(dims, rank, tokens, pairs, scored)
    fed = QKV | MLP_INPUT if dims.parallel else QKV
    first = [linear for linear in dims.linears if linear.name in fed]
    return Flops(
        linears=once.linears - 2 * tokens * sum(linear.inputs * linear.outputs for linear in first),
        adapters=2 * once.adapters - 2 * tokens * rank * sum(linear.inputs for linear in first),
        attention=(3 if dims.attention_softcap else 2) * once.attention,  # capped scores are made again
        head=once.head,
    )


@dataclass(frozen=True)
class Part:
    """A part of a step that cannot begin before the part above it has ended.

    Attributes:
        name: ``copy`` (of NF4 weights in 16 bits), ``prefill``, ``decode``; ``reference``; ``passes`` (forward and
            backward), ``optimizer``.
        phase: rollout, score or update.
        flops, memory: FLOPs, and bytes read and written.
        rows: tokens that its products have at once.
    """

    name: str
    phase: str
    flops: Flops
    memory: int
    rows: int = 0


@dataclass(frozen=True)
class Layout:
    """How the model lies in memory.

    Attributes:
        quantization: of the blocks' linear weights.
        width: bytes of a number in the compute dtype.
        rank: of the adapter.
        rollout_copy: the rollout reads a 16-bit copy of NF4 weights, made in every step.
    """

    quantization: str
    width: int
    rank: int
    rollout_copy: bool

    def weights(self, dims: ModelDimensions) -> int:
        """Bytes that a pass of the update or of the reference reads of the blocks' weights."""
        return block_weight_bytes(dims, self.quantization, self.width)

    def head(self, dims: ModelDimensions) -> int:
        """Bytes of the output head."""
        return dims.vocab_size * dims.hidden_size * self.width

    def adapters(self, dims: ModelDimensions) -> int:
        """Bytes of the adapter's copy in the compute dtype."""
        return dims.lora_parameters(self.rank) * self.width

    def rollout(self, dims: ModelDimensions) -> int:
        """Bytes that one decoding pass reads of weights: blocks, adapter and head."""
        blocks = dims.linear_parameters * self.width if self.rollout_copy else self.weights(dims)
        return blocks + self.adapters(dims) + self.head(dims)


def decode_bytes(dims: ModelDimensions, tokens: Tokens, rows: int, layout: Layout) -> int:
    """Return the bytes that decoding reads and writes: weights once a pass, keys and values of all that is attended.

    Completions are written in waves of at most ``rows``, all at the same place of their completions; a wave has as many
    passes as its longest one has tokens, less the first, which the prompt gives. In a pass each prompt's keys and
    values are read once for all its completions that are still written; each of these reads its own and adds a token's.
    """
    cache = kv_bytes_per_token(dims, layout.width)
    jobs = [(b, prompt, n) for b, (prompt, members) in enumerate(tokens.groups) for n in members]
    total = 0
    for start in range(0, len(jobs), rows):
        wave = jobs[start : start + rows]
        for t in range(1, max(n for _, _, n in wave)):
            live = [(b, prompt) for b, prompt, n in wave if n > t]
            attended = sum(prompt for _, prompt in set(live)) + len(live) * t
            total += layout.rollout(dims) + (attended + len(live)) * cache
    return total


def parts(
    dims: ModelDimensions, tokens: Tokens, layout: Layout, rows: int, budget: int, checkpointing: bool | int
) -> list[Part]:
    """Return a GRPO step with a KL term, part by part.

    Bytes besides decoding: a pass of at most ``budget`` packed tokens reads all weights once in each direction, once
    more to recompute, and the optimizer reads and writes fp32 numbers. Activations count nothing: a perfect kernel
    would keep them in the cache.

    Args:
        rows: completions written at once.
    """
    fed, pairs, scored = tokens.packed, tokens.pairs, tokens.scored
    again = recomputed_layers(dims, checkpointing)
    prompts, size = sum(tokens.prompts), (dims, layout.rank)
    passes = -(-fed // budget)
    read = layout.weights(dims) + layout.head(dims)
    copied = layout.weights(dims) + dims.linear_parameters * layout.width if layout.rollout_copy else 0
    update = (
        forward(*size, fed, pairs, scored)
        + recomputed(*size, fed, pairs, checkpointing)
        + backward(*size, fed, pairs, scored)
    )
    trained = dims.lora_parameters(layout.rank)
    own = fed - prompts
    return [
        Part("copy", "rollout", Flops(), copied),
        Part(
            "prefill",
            "rollout",
            forward(*size, prompts, tokens.prompt_pairs, len(tokens.prompts)),
            -(-prompts // budget) * layout.rollout(dims) + prompts * kv_bytes_per_token(dims, layout.width),
            min(prompts, budget),
        ),
        Part(
            "decode",
            "rollout",
            forward(*size, own, tokens.decode_pairs, own),
            decode_bytes(dims, tokens, rows, layout),
            min(rows, len(tokens.completions)),
        ),
        Part("reference", "score", forward(dims, 0, fed, pairs, scored), passes * read, min(fed, budget)),
        Part(
            "passes",
            "update",
            update,
            passes * (2 * dims.num_layers + again) * (read + layout.adapters(dims)) // dims.num_layers,
            min(fed, budget),
        ),
        Part("optimizer", "update", Flops(), trained * OPTIMIZER_BYTES),
    ]
