"""The layout of packed rows, and the cutting into micro-batches."""

import random

import pytest
from tiny_models import CPU

from lowmem_rlhf.engine.packing import ATTENDED_PER_TOKEN, Group, pack, split_groups


def test_a_packed_row_by_hand():
    """Two groups of one shape lie together, the third, with another prompt length, behind them."""
    groups = [
        Group([10, 11], [[20, 21, 22], [23]], [0, 1]),
        Group([12], [[30, 31]], [4]),
        Group([13, 14], [[24, 25], [26, 27]], [2, 3]),
    ]
    packed = pack(groups, CPU)
    # the last token of a completion is only predicted, never fed
    #                                 prompts       | 20 21 | - | 24 | 26 |  12 30
    assert packed.input_ids.tolist() == [[10, 11, 13, 14, 20, 21, 24, 26, 12, 30]]
    assert packed.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 2, 2, 0, 1]]
    assert packed.prompt_ends == (1, 8, 3)
    assert packed.targets.tolist() == [20, 21, 22, 23, 24, 25, 26, 27, 30, 31]
    assert packed.predict.tolist() == [1, 4, 5, 1, 3, 6, 3, 7, 8, 9]
    assert packed.rows == (0, 1, 2, 3, 4)
    assert packed.lengths == (3, 1, 2, 2, 2)
    assert packed.row_index.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert [(b.start, b.count, b.prompt, b.completions) for b in packed.buckets] == [
        (0, 2, 2, (2, 0, 1, 1)),
        (8, 1, 1, (1,)),
    ]
    assert [(b.middle, b.end) for b in packed.buckets] == [(4, 8), (9, 10)]
    assert sum(g.tokens for g in groups) == packed.input_ids.numel()


def test_only_prompts_for_prefill():
    packed = pack([Group([5, 6, 7], [], []), Group([8], [], [])], CPU)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8]]
    assert packed.prompt_ends == (2, 3)
    assert packed.targets.numel() == packed.predict.numel() == 0


def random_groups(seed):
    rng = random.Random(seed)
    groups, row = [], 0
    for _ in range(rng.randint(1, 6)):
        prompt = [rng.randint(5, 90) for _ in range(rng.randint(1, 40))]
        completions = [[rng.randint(5, 90) for _ in range(rng.randint(1, 50))] for _ in range(rng.randint(1, 9))]
        groups.append(Group(prompt, completions, list(range(row, row + len(completions)))))
        row += len(completions)
    return groups


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [1, 40, 90, 300, 5000])
def test_micro_batches_hold_every_row_once_and_keep_the_budget(seed, budget):
    groups = random_groups(seed)
    whole = {row: (g.prompt, c) for g in groups for row, c in zip(g.rows, g.completions, strict=True)}
    parts = split_groups(groups, budget)
    seen = {}
    for part in parts:
        rows = [row for group in part for row in group.rows]
        assert not seen.keys() & set(rows)
        seen |= {row: (g.prompt, c) for g in part for row, c in zip(g.rows, g.completions, strict=True)}
        if len(rows) > 1:
            assert sum(group.tokens for group in part) <= budget
            assert sum(group.attended for group in part) <= ATTENDED_PER_TOKEN * budget
    assert seen == whole
    if budget == 5000:
        assert len(parts) == 1
    shuffled = random.Random(seed).sample(groups, len(groups))
    again = split_groups(shuffled, budget)
    assert sorted(row for part in again for group in part for row in group.rows) == sorted(whole)


def test_a_single_long_completion_gets_a_micro_batch_of_its_own():
    groups = [Group([1] * 5, [[2] * 100, [2] * 3, [2] * 4], [0, 1, 2])]
    parts = split_groups(groups, 20)
    assert sorted(sorted(row for g in part for row in g.rows) for part in parts) == [[0], [1, 2]]


def test_many_short_completions_of_a_long_prompt_are_split_for_attention():
    """100 prompt tokens and 60 completions of one fed token: 160 tokens, but 6,000 expanded prompt keys."""
    group = Group([1] * 100, [[2, 3] for _ in range(60)], list(range(60)))
    parts = split_groups([group], 300)
    assert group.tokens < 300
    assert len(parts) > 1
    assert all(sum(g.attended for g in part) <= ATTENDED_PER_TOKEN * 300 for part in parts)


def test_splitting_does_not_repeat_a_prompt_within_one_group():
    group = Group([1] * 10, [[2] * 6 for _ in range(8)], list(range(8)))
    assert group.tokens == 10 + 8 * 5
    parts = split_groups([group], 30)
    fed = sum(g.tokens for part in parts for g in part)
    assert fed == 8 * 5 + 10 * sum(len(part) for part in parts)
    assert len(parts) == 2
