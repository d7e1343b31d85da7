"""Passes over groups of completions in packed micro-batches: log-probs of their tokens, and what a role's head says.

Among several processes (`processes.world.together`) each runs its share of the groups, by tokens; what is read of the
passes is gathered, so that all of them have the whole.

A head's output is one number a position: a critic's values, a reward model's scores. Position t of a completion is the
one before its token t, so there are as many as tokens. Where the last token is to be read as well,
`with_bootstrap_position` makes one position more.

Shapes: N completions, S scored positions of a micro-batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.logprobs import Entropy, tiled_logprobs
from lowmem_rlhf.engine.packing import Group, PackedBatch, own_groups
from lowmem_rlhf.processes.world import current
from lowmem_rlhf.progress import ProgressCallback


@dataclass(frozen=True)
class BatchLimits:
    """How passes over a batch are cut: tokens a micro-batch, positions a logits tile; and the sampling temperature."""

    temperature: float
    micro_batch_tokens: int
    tile: int


def micro_batches(
    base: SharedBase, groups: Sequence[Group], tokens: int, progress: ProgressCallback | None = None
) -> Iterator[PackedBatch]:
    """Yield groups laid out on the base's device, in micro-batches of at most ``tokens`` fed tokens.

    Among several processes these are this one's share of the groups, maybe none.

    Args:
        progress: called with (micro-batches done, all of them) once the caller is done with each.
    """
    parts = base.layout.split(own_groups(groups, current()), tokens)
    for done, part in enumerate(parts, 1):
        yield base.layout.lay_out(part, base.device)
        if progress:
            progress(done, len(parts))


def packed_logprobs(
    base: SharedBase, batch: PackedBatch, temperature: float, tile: int, entropy: Entropy = "value"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies (S,) of a packed row's scored tokens in the role that ``base`` is in."""
    predicting = base.states(batch).index_select(0, batch.predict)
    return tiled_logprobs(predicting, batch.targets, base.head, temperature, tile, entropy)


@torch.no_grad()
def completion_logprobs(
    base: SharedBase, groups: Sequence[Group], limits: BatchLimits, progress: ProgressCallback | None = None
) -> dict[int, torch.Tensor]:
    """Return by row the log-probs of a completion's tokens, fp32, in the role that ``base`` is in."""
    logps: dict[int, torch.Tensor] = {}
    for packed in micro_batches(base, groups, limits.micro_batch_tokens, progress):
        values, _ = packed_logprobs(base, packed, limits.temperature, limits.tile, entropy="none")
        logps.update(zip(packed.rows, values.split(packed.lengths), strict=True))
    return current().rows(logps, base.device)


def with_bootstrap_position(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with one more token behind every completion, so that a pass reads their last tokens too.

    The added token itself is never read: a completion's last token is not fed to the model.
    """
    return [replace(group, completions=[[*ids, ids[-1]] for ids in group.completions]) for group in groups]


def packed_outputs(base: SharedBase, role: str, packed: PackedBatch) -> torch.Tensor:
    """Return what the role's head says at the scored positions (S,), fp32, with gradients where they are on."""
    return base.outputs(role, base.states(packed).index_select(0, packed.predict))


def last_of_each(values: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """Return the value at the last position of each completion of a packed row."""
    ends = torch.tensor(packed.lengths, dtype=torch.long, device=values.device).cumsum(0) - 1
    return values.index_select(0, ends)


@torch.no_grad()
def head_outputs(
    base: SharedBase, role: str, groups: Sequence[Group], limits: BatchLimits, progress: ProgressCallback | None = None
) -> dict[int, torch.Tensor]:
    """Return by row what the role's head says at the positions of each completion, fp32."""
    outputs: dict[int, torch.Tensor] = {}
    with base.role(role):
        for packed in micro_batches(base, groups, limits.micro_batch_tokens, progress):
            values = packed_outputs(base, role, packed)
            outputs.update(zip(packed.rows, values.split(packed.lengths), strict=True))
    return current().rows(outputs, base.device)
