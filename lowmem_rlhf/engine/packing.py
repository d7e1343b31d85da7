"""Shared-prompt packing: one row holds every group's prompt once and its completions, without padding.

The prompt's tokens run once per group. A completion's last token predicts nothing that is scored, so it is not fed.
Positions are explicit: completions continue at the prompt's length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lowmem_rlhf.planning.limits import ATTENDED_PER_TOKEN
from lowmem_rlhf.processes.world import World


@dataclass(frozen=True)
class Group:
    """One prompt and completions of it, as token ids; ``rows`` are the completions' places in the whole batch."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    rows: Sequence[int]

    @property
    def tokens(self) -> int:
        """Tokens that this group feeds to the model."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.completions)

    @property
    def attended(self) -> int:
        """Key positions that attention holds for this group: each completion sees the prompt."""
        return len(self.prompt) + sum(len(self.prompt) + len(c) - 1 for c in self.completions)


@dataclass(frozen=True)
class Bucket:
    """Groups of equal shape that lie together, so that one attention call serves them all.

    The row holds ``count`` prompts of ``prompt`` tokens each, then all their completions in order.

    Attributes:
        start: first position of the bucket in the row.
        count: groups in the bucket.
        prompt: tokens of each prompt.
        completions: fed tokens of each completion, ``count`` times the same number of completions.
    """

    start: int
    count: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def middle(self) -> int:
        """Where the completions begin."""
        return self.start + self.count * self.prompt

    @property
    def end(self) -> int:
        """First position behind the bucket."""
        return self.middle + sum(self.completions)


@dataclass(frozen=True)
class PackedBatch:
    """A packed row on the device.

    Attributes:
        input_ids, position_ids: (1, T).
        buckets: where the groups lie.
        prompt_ends: for every group, in the order given to `pack`, the position of its prompt's last token.
        predict: (S,) for every scored token the position whose hidden state predicts it.
        targets: (S,) the scored tokens: all completion tokens in order.
        rows: the completions' places in the whole batch, in the order of the scored tokens.
        lengths: scored tokens of each completion.
        row_index: (S,) for every scored token the place of its completion in ``rows``.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    buckets: tuple[Bucket, ...]
    prompt_ends: tuple[int, ...]
    predict: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    row_index: torch.Tensor


def pack(groups: Sequence[Group], device: torch.device) -> PackedBatch:
    """Lay groups out in one row on ``device``, groups with equal prompt length and number of completions together."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, group in enumerate(groups):
        shapes.setdefault((len(group.prompt), len(group.completions)), []).append(i)
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    completions: list[Sequence[int]] = []
    rows: list[int] = []
    buckets: list[Bucket] = []
    prompt_ends = [0] * len(groups)
    for (length, _), members in shapes.items():
        start = len(ids)
        for i in members:
            ids += groups[i].prompt
            positions += range(length)
            prompt_ends[i] = len(ids) - 1
        for i in members:
            for completion in groups[i].completions:
                predict += [prompt_ends[i], *range(len(ids), len(ids) + len(completion) - 1)]
                ids += completion[:-1]
                positions += range(length, length + len(completion) - 1)
                completions.append(completion)
            rows += groups[i].rows
        fed = tuple(len(c) - 1 for i in members for c in groups[i].completions)
        buckets.append(Bucket(start, len(members), length, fed))

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return PackedBatch(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        buckets=tuple(buckets),
        prompt_ends=tuple(prompt_ends),
        predict=tensor(predict),
        targets=tensor([token for c in completions for token in c]),
        rows=tuple(rows),
        lengths=tuple(len(c) for c in completions),
        row_index=tensor([i for i, c in enumerate(completions) for _ in c]),
    )


def scored_only(batch: PackedBatch, scored: Mapping[int, Sequence[bool]]) -> PackedBatch:
    """Return a batch, of any layout, in which only some completion tokens are scored; all are fed as before.

    Args:
        scored: by a completion's place in the whole batch, which of its tokens; a completion that is absent is scored
            as a whole.
    """
    if not any(row in scored for row in batch.rows):
        return batch
    masks = [scored.get(row, [True] * length) for row, length in zip(batch.rows, batch.lengths, strict=True)]
    places = [place for place, kept in enumerate(one for mask in masks for one in mask) if kept]
    index = torch.tensor(places, dtype=torch.long, device=batch.predict.device)
    return replace(
        batch,
        predict=batch.predict.index_select(0, index),
        targets=batch.targets.index_select(0, index),
        lengths=tuple(sum(mask) for mask in masks),
        row_index=batch.row_index.index_select(0, index),
    )


def own_groups(groups: Sequence[Group], world: World) -> Sequence[Group]:
    """Return this process's share of the groups, by the tokens that they feed to the model.

    A group whose completions fall to two processes has its prompt in both.
    """
    if not world.several:
        return groups
    costs = [len(group.prompt) / len(group.rows) + len(c) - 1 for group in groups for c in group.completions]
    own, first, shares = world.own(costs), 0, list[Group]()
    for group in groups:
        places = range(max(own.start - first, 0), min(own.stop - first, len(group.rows)))
        if places:
            completions, rows = [group.completions[place] for place in places], [group.rows[place] for place in places]
            shares.append(Group(group.prompt, completions, rows))
        first += len(group.rows)
    return shares


def split_groups(groups: Sequence[Group], max_tokens: int) -> list[list[Group]]:
    """Cut groups into micro-batches of at most ``max_tokens`` fed tokens, longest first, splitting groups when needed.

    A split group repeats its prompt. A single completion longer than the budget gets a micro-batch of its own. The
    expanded prompt keys are bounded too (`ATTENDED_PER_TOKEN`), so that many short completions of a long prompt do
    not outgrow the budget.
    """
    pieces = [piece for group in groups for piece in _split(group, max_tokens)]
    pieces.sort(key=lambda piece: piece.tokens, reverse=True)
    batches: list[list[Group]] = []
    room: list[tuple[int, int]] = []  # tokens and attended positions left in each batch
    for piece in pieces:
        for i, (tokens, attended) in enumerate(room):
            if piece.tokens <= tokens and piece.attended <= attended:
                batches[i].append(piece)
                room[i] = (tokens - piece.tokens, attended - piece.attended)
                break
        else:
            batches.append([piece])
            room.append((max_tokens - piece.tokens, ATTENDED_PER_TOKEN * max_tokens - piece.attended))
    return batches


def _split(group: Group, max_tokens: int) -> list[Group]:
    pieces: list[Group] = []
    completions: list[Sequence[int]] = []
    rows: list[int] = []
    for row, completion in sorted(zip(group.rows, group.completions, strict=True), key=lambda item: -len(item[1])):
        grown = Group(group.prompt, [*completions, completion], [*rows, row])
        if completions and (grown.tokens > max_tokens or grown.attended > ATTENDED_PER_TOKEN * max_tokens):
            pieces.append(Group(group.prompt, completions, rows))
            completions, rows = [], []
        completions.append(completion)
        rows.append(row)
    return [*pieces, Group(group.prompt, completions, rows)] if completions else pieces
