"""Whether a server's base is ours: log-probs of a short text, compared with our own."""

from collections.abc import Sequence

import torch

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.rollout.server.client import ServerFault

TEXT = "The capital of France is Paris. Two and three are five, and ten times ten is 100. What is 7 + 8? It is 15."
TOKENS = 48  # of it, at most
# Nats a token, mean absolute difference. SmolLM2-135M: bfloat16 beside fp32 0.04, llama.cpp's products in 8 bits 0.06,
# NF4 made of its 4-bit GGUF beside fp32 0.59; larger models lose less.
OTHER_BASE, OTHER_BASE_QUANTIZED = 0.3, 1.0


def check_text(base: SharedBase, longest: int) -> list[int]:
    """Return the tokens of a short text, no longer than so many."""
    ids = base.tokenizer(TEXT, add_special_tokens=False).input_ids
    return [int(one) for one in ids][: min(TOKENS, longest - 1)]


@torch.no_grad()
def logps_of(base: SharedBase, prompt: Sequence[int], ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Return our log-probs of tokens that follow a prompt, in the role that the base is in."""
    groups = [Group(list(prompt), [list(ids)], [0])]
    limits = BatchLimits(temperature or 1.0, len(prompt) + len(ids), 64)
    found: list[float] = completion_logprobs(base, groups, limits)[0].tolist()
    return found


def text_difference(base: SharedBase, theirs: Sequence[float], ours: Sequence[float], url: str, model: str) -> float:
    """Return the mean absolute difference in nats a token.

    Raises:
        ServerFault: it is more than rounding explains, or than what quantized weights here lose.
    """
    difference = sum(abs(a - b) for a, b in zip(theirs, ours, strict=True)) / len(ours)
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in base.adapter_layers()]
    quantized = any(isinstance(one, torch.Tensor) and not one.is_floating_point() for one in weights)
    most = OTHER_BASE_QUANTIZED if quantized else OTHER_BASE
    if not difference <= most:
        raise ServerFault(
            f"{url} has another base: on a short text its log-probs are {difference:.2g} nats a token from those of "
            f"{model!r} here, where {most:g} is the most that can be explained; start it with the recipe's model"
        )
    return difference
