"""Passes whose result is one number a position: a critic's values, a reward model's scores.

Position t of a completion is the one before its token t, so there are as many as tokens. Where the last token is to be
read as well, `ahead` makes one position more.

Shapes: N completions, S positions of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lowmem_rlhf.model.base import SharedBase
from lowmem_rlhf.model.packing import Group, PackedBatch
from lowmem_rlhf.training.update import PassSettings, Progress


def ahead(groups: Sequence[Group]) -> list[Group]:
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
    base: SharedBase, role: str, groups: Sequence[Group], passes: PassSettings, progress: Progress | None = None
) -> dict[int, torch.Tensor]:
    """Return by row what the role's head says at the positions of each completion, fp32."""
    found: dict[int, torch.Tensor] = {}
    parts = base.layout.cut(groups, passes.micro_batch_tokens)
    with base.role(role):
        for i, part in enumerate(parts):
            packed = base.layout.lay_out(part, base.device)
            values = packed_outputs(base, role, packed)
            found.update(zip(packed.rows, values.split(packed.lengths), strict=True))
            if progress:
                progress(i + 1, len(parts))
    return found
