"""Whether a server's base is ours: log-probs of a short text, compared with our own."""

from collections.abc import Sequence

import torch

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.rollout.server.client import ServerFault

TEXT = "The capital of France is Paris. Two and three are five, and ten times ten is 100. What is 7 + 8? It is 15."
TOKENS = 48  # of it, at most
# nats a token, mean absolute difference: roundings of a base, NF4 beside 16 bits too, stay below; another base does not
OTHER_BASE = 0.5


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


def text_difference(theirs: Sequence[float], ours: Sequence[float], url: str, model: str) -> float:
    """Return the mean absolute difference in nats a token.

    Raises:
        ServerFault: it is more than roundings explain.
    """
    difference = sum(abs(a - b) for a, b in zip(theirs, ours, strict=True)) / len(ours)
    if not difference <= OTHER_BASE:
        raise ServerFault(
            f"{url} has another base: on a short text its log-probs are {difference:.2g} nats a token from those of "
            f"{model!r} here, where {OTHER_BASE:g} is the most that roundings explain; start it with the recipe's model"
        )
    return difference
