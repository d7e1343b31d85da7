"""The padded path, for models whose tokens cannot be packed: a row is one prompt with one completion of it.

The stock attention stays. Rows are padded on the right: a causal model never sees what stands behind a token, so this
is exact for recurrent and convolutional layers too, and no mask is needed. What scores and trains on the hidden states
is the same code as on the packed path.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem_rlhf.engine.mixers import is_mixer
from lowmem_rlhf.engine.packing import Group, PackedBatch, pack, split_groups
from lowmem_rlhf.engine.trial import nudged_layers
from lowmem_rlhf.hardware.memory import is_out_of_memory

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase

CACHE_NAMES = ("past_key_values", "cache_params")  # how a model's forward calls its cache
KEEPING_STATE = {"conv", "linear_attention", "hybrid"}  # kinds of layers, as configurations name them
TOKEN_BY_TOKEN = {"mlp", "moe"}
READ, DECODED = 20, 8  # tokens of the trial's prompts, and of what follows: what clamps few of them shows on some
COMMON_TOKENS = 250  # of the vocabulary, the first ones
NOISES = 8.0  # a recurrence sums in another order than a whole pass does, and each of its steps rounds
COMMON = 3  # tokens that both texts of the trial of causality begin with
CLOSE = 5e-5  # of a state's size, for the same reason where nothing is rounded to 16 bits


def why_not_packed(model: PreTrainedModel) -> str:
    """Return the reason why a model cannot be packed, as the end of a sentence; an empty string when it can.

    Tokens must meet in nothing but attention of a kind that our function computes, and convolutions and recurrences
    that `mixers` keeps apart. Other recurrent layers would let completions of one row see each other; attention sinks
    (GPT-OSS) and compressed or chunked attention would be left out without a word.
    """
    layers = list(getattr(model.config.get_text_config(), "layer_types", None) or ())
    keeping = sum(kind in KEEPING_STATE for kind in layers)
    if getattr(model, "_is_stateful", False) or keeping:
        mixers = sum(map(is_mixer, model.modules()))
        if mixers < (keeping if layers else 1):
            return "its layers pass state from token to token"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    if other := set(layers) - KEEPING_STATE - TOKEN_BY_TOKEN - {"full_attention", "sliding_attention"}:
        return f"its layers are of the kind {' and '.join(sorted(other))}"
    if not model._can_set_attn_implementation():
        return "its attention cannot be replaced"
    return ""


@dataclass(frozen=True)
class Layout:
    """How groups become batches: ``split`` into micro-batches of at most so many fed tokens, then ``lay_out`` each."""

    split: Callable[[Sequence[Group], int], list[list[Group]]]
    lay_out: Callable[[Sequence[Group], torch.device], PackedBatch]


def pad(groups: Sequence[Group], device: torch.device) -> PackedBatch:
    """Lay groups out as rows of equal length on ``device``, each a prompt and one completion of it.

    Returns:
        A batch without buckets; ``input_ids`` and ``position_ids`` are (R, L), and ``predict`` counts positions over
        all rows. As in `pack`, a completion's last token is not fed.
    """
    rows = [(g.prompt, c, row) for g in groups for c, row in zip(g.completions, g.rows, strict=True)]
    longest = max(len(prompt) + len(completion) - 1 for prompt, completion, _ in rows)
    ids: list[int] = []
    predict: list[int] = []
    for prompt, completion, _ in rows:
        predict += range(len(ids) + len(prompt) - 1, len(ids) + len(prompt) + len(completion) - 1)
        fed = [*prompt, *completion[:-1]]
        ids += fed + fed[-1:] * (longest - len(fed))  # any token of the vocabulary: nobody sees it

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return PackedBatch(
        input_ids=tensor(ids).view(len(rows), longest),
        position_ids=torch.arange(longest, dtype=torch.long, device=device).expand(len(rows), -1),
        buckets=(),
        prompt_ends=(),
        predict=tensor(predict),
        targets=tensor([token for _, completion, _ in rows for token in completion]),
        rows=tuple(row for _, _, row in rows),
        lengths=tuple(len(completion) for _, completion, _ in rows),
        row_index=tensor([i for i, (_, completion, _) in enumerate(rows) for _ in completion]),
    )


def split_padded(groups: Sequence[Group], max_tokens: int) -> list[list[Group]]:
    """Cut groups into micro-batches of at most ``max_tokens`` tokens, padding included, longest rows first.

    Rows of similar length come together. One that is longer than the budget gets a micro-batch of its own.
    """
    rows = [Group(g.prompt, [c], [row]) for g in groups for c, row in zip(g.completions, g.rows, strict=True)]
    rows.sort(key=lambda row: row.tokens, reverse=True)
    batches: list[list[Group]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * batches[-1][0].tokens <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


PACKED = Layout(split_groups, pack)
PADDED = Layout(split_padded, pad)


def forward_names(decoder: nn.Module) -> tuple[bool, str]:
    """Return whether a decoder's forward takes explicit positions, and how it calls its cache ("": it takes none)."""
    names = inspect.signature(decoder.forward).parameters
    return "position_ids" in names, next((name for name in CACHE_NAMES if name in names), "")


def training_modes(model: nn.Module) -> None:
    """Let nothing but whole layers, adapters and quantized weights be in training mode; a frozen model is not trained.

    Checkpointing works in this mode only, and quantized layers stay as they are loaded. All else must not be in it: a
    router that samples its experts while training, or a mixer that takes a fused kernel then, which multiplies
    with weights directly, past their adapters.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer | LoraLayer | Linear4bit | Linear8bitLt)


@torch.no_grad()
def reads_ahead(base: "SharedBase") -> bool:
    """Try out whether the states of a text depend on how it goes on: then the model is not causal."""
    ids = torch.tensor([[1, 2, 3, 4, 1, 2], [1, 2, 3, 2, 4, 3]], dtype=torch.long, device=base.device)
    positions = torch.arange(ids.shape[1], dtype=torch.long, device=base.device).expand(2, -1)
    states = base.stock_states(ids, positions)[:, :COMMON].float()
    with nudged_layers(base.model, base.dtype):
        moved = base.stock_states(ids, positions)[:, :COMMON].float()
    noise, off, size = (x.square().mean(-1).sqrt() for x in ((moved - states)[0], states[0] - states[1], states[0]))
    return bool((off > NOISES * noise + CLOSE * size).any())


@torch.no_grad()
def cache_follows_rows(base: "SharedBase") -> bool:
    """Try out whether decoding with a cache whose rows were reordered and repeated gives what whole rows give.

    It does not where a model keeps its state in its modules (RecurrentGemma), or where its cache is one of its own.
    """
    order = torch.tensor([1, 0, 1], dtype=torch.long, device=base.device)
    embedding: Any = base.model.get_input_embeddings()
    vocabulary = min(COMMON_TOKENS, embedding.weight.shape[0])
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randint(1, vocabulary, (2, READ + DECODED), generator=generator, dtype=torch.long, device="cpu")
    ids = drawn.to(base.device)
    positions = torch.arange(ids.shape[1], dtype=torch.long, device=base.device).expand(3, -1)
    want = base.stock_states(ids, positions[:2])[order, READ:]
    with nudged_layers(base.model, base.dtype):
        moved = base.stock_states(ids, positions[:2])[order, READ:]
    try:
        cache = DynamicCache(config=base.model.config)
        base.stock_states(ids[:, :READ], positions[:2, :READ], cache)
        cache.reorder_cache(order)  # type: ignore[arg-type]
        decoded = [
            base.stock_states(ids[order, t : t + 1], positions[:, t : t + 1], cache) for t in range(READ, ids.shape[1])
        ]
    except Exception as error:  # whatever a model of its own kind raises: its cache is not to be had
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return False
    got = torch.cat(decoded, dim=1)
    noise, off, size = (x.float().square().mean(-1).sqrt() for x in (moved - want, got - want, want))
    return bool((off <= NOISES * noise + CLOSE * size).all())
