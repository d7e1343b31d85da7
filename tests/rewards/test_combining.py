"""Gates, normalisation and the weighted sum: against TRL's lines, and nothing changed without them."""

import math
import random

import pytest
import torch

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import load_recipe, validate_recipe
from lowmem_rlhf.rewards import Reward, load_rewards, score
from lowmem_rlhf.rewards.combining import standardized
from lowmem_rlhf.rollout.scores import Scores

NAN = math.nan


def reward(name, values, weight=1.0, **keys):
    return Reward(name, lambda **_: list(values), weight, **keys)


def scored(*rewards, num_generations=None) -> Scores:
    count = len(rewards[0].function())
    return score(rewards, ["p"] * count, ["c"] * count, [[]] * count, {}, num_generations=num_generations)


def drawn(rows, none=0.2, seed=0):
    draw = random.Random(seed)
    return [None if draw.random() < none else draw.gauss(0, 3) for _ in range(rows)]


def same(got, wanted):
    assert [repr(value) for value in got] == [repr(value) for value in wanted]


def test_without_gates_and_normalisation_the_sums_are_bit_for_bit_the_weighted_ones():
    columns, weights = [drawn(64, seed=seed) for seed in range(3)], [1.0, 0.1, -0.7]
    rewards = [reward(f"r{n}", c, w) for n, (c, w) in enumerate(zip(columns, weights, strict=True))]
    wanted = []
    for row in zip(*columns, strict=True):
        parts = [weight * value for weight, value in zip(weights, row, strict=True) if value is not None]
        wanted.append(math.fsum(parts) if parts else NAN)
    for generations in (None, 4, 64):
        scores = scored(*rewards, num_generations=generations)
        same(scores.total, wanted)
        same(scores.raw_total, wanted)
        assert list(scores.by_name.values()) == columns


def test_a_gate_is_open_above_0_and_at_a_threshold():
    first = reward("a", [1.0, 0.5, 0.0, -1.0, None])
    second = [10.0] * 5
    total = scored(first, reward("b", second, requires={"a": None})).total
    same(total, [11.0, 10.5, 0.0, -1.0, NAN])  # the last: `a` does not apply, and opens nothing
    total = scored(first, reward("b", second, requires={"a": 0.5})).total
    same(total, [11.0, 10.5, 0.0, -1.0, NAN])
    total = scored(first, reward("b", second, requires={"a": -1.0})).total
    same(total, [11.0, 10.5, 10.0, 9.0, NAN])


def test_gates_follow_each_other_whatever_the_order():
    a, b = reward("a", [1.0, 0.0, 1.0]), reward("b", [1.0, 1.0, None], requires={"a": None})
    c = reward("c", [5.0, 5.0, 5.0], requires={"b": None})
    scores = scored(c, b, a)
    same(scores.total, [7.0, 0.0, 1.0])
    assert scores.by_name == {"c": [5.0] * 3, "b": [1.0, 1.0, None], "a": [1.0, 0.0, 1.0]}  # metrics keep raw values
    both = reward("d", [5.0, 5.0, 5.0], requires={"a": None, "b": 1.0})
    same(scored(a, b, both).total, [7.0, 0.0, 1.0])


def test_a_weight_changes_no_gate():
    a = reward("a", [1.0, 0.0], weight=-2.0)
    same(scored(a, reward("b", [1.0, 1.0], requires={"a": None})).total, [-1.0, 0.0])


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("none", [0.0, 0.3])
def test_normalised_values_are_torchs(size, none):
    from trl.trainer.utils import nanstd

    values = drawn(64, none)
    grouped = torch.tensor([NAN if v is None else v for v in values], dtype=torch.float64).view(-1, size)
    wanted = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    got = torch.tensor([NAN if v is None else v for v in standardized(values, size)], dtype=torch.float64)
    several = (~grouped.isnan()).sum(dim=1, keepdim=True).expand_as(grouped).flatten() > 1
    torch.testing.assert_close(got[several], wanted.flatten()[several], equal_nan=True)


def test_equal_values_and_one_alone_become_exactly_0():
    same(standardized([0.1, 0.1, 0.1], 3), [0.0] * 3)
    same(standardized([None, 7.0, None], 3), [None, 0.0, None])
    same(standardized([], 4), [])


def test_normalised_group_sums_scaled_by_the_batch_are_trls_normalize_then_sum():
    """The lines of TRL 1.16's GRPOTrainer for multi_objective_aggregation="normalize_then_sum"."""
    from trl.trainer.utils import nanstd

    from lowmem_rlhf.algorithms.grpo.math import group_advantages

    generations, weights = 4, torch.tensor([1.0, 0.5, -2.0])
    columns = [drawn(32, 0.0, seed) for seed in range(2)] + [[1.0] * 32]
    rewards = [
        reward(f"r{n}", c, float(w), normalize="group") for n, (c, w) in enumerate(zip(columns, weights, strict=True))
    ]
    total = torch.tensor(scored(*rewards, num_generations=generations).total, dtype=torch.float32)
    got = group_advantages(total.view(-1, generations), "batch").flatten()

    rewards_per_func = torch.tensor(columns).T
    grouped = rewards_per_func.view(-1, generations, 3)
    mean_k = torch.nanmean(grouped, dim=1, keepdim=True)
    reward_k = ((grouped - mean_k) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)).view(-1, 3)
    summed = (reward_k * weights.unsqueeze(0)).nansum(dim=1)
    wanted = (summed - torch.nanmean(summed)) / (nanstd(summed).expand_as(summed) + 1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_only_what_counts_is_normalised_and_only_where_something_is_learned():
    a = reward("a", [1.0, 1.0, 0.0, 1.0])
    b = reward("b", [2.0, 4.0, 100.0, None], weight=3.0, requires={"a": None}, normalize="group")
    apart = 1 / (math.sqrt(2) + 1e-4)  # of 2 and 4: mean 3, deviation sqrt(2)
    scores = scored(a, b, num_generations=4)
    assert scores.total == pytest.approx([1 - 3 * apart, 1 + 3 * apart, 0.0, 1.0], abs=1e-12)
    assert scores.raw_total == [7.0, 13.0, 0.0, 1.0]
    assert scored(a, b).total == scored(a, b).raw_total == [7.0, 13.0, 0.0, 1.0]


def test_groups_and_the_batch_are_apart():
    values = [0.0, 1.0, 10.0, 11.0]
    by_group = scored(reward("a", values, normalize="group"), num_generations=2).total
    assert by_group[:2] == by_group[2:] == [-by_group[1], by_group[1]]
    by_batch = scored(reward("a", values, normalize="batch"), num_generations=2).total
    assert by_batch == standardized(values, 4) and by_batch[1] < 0 < by_batch[2]


def recipe(*rewards, **keys):
    return validate_recipe({"model": "m", "data": {"train": "arithmetic"}, "rewards": list(rewards), **keys})


A, B = {"function": "arithmetic_answer", "name": "a"}, {"function": "think_format", "name": "b"}


def test_recipes_say_gates_by_name_or_with_a_threshold():
    made = recipe(A, {**B, "requires": "a"}, {**B, "name": "c", "requires": {"a": 0.5}, "normalize": "batch"})
    assert [one.gates for one in made.rewards] == [{}, {"a": None}, {"a": 0.5}]
    assert [(one.requires, one.normalize) for one in load_rewards(made.rewards)] == [
        ({}, "none"),
        ({"a": None}, "none"),
        ({"a": 0.5}, "batch"),
    ]
    text = "rewards=[{function: arithmetic_answer}, {function: think_format, requires: {arithmetic_answer: 1}}]"
    assert load_recipe("quickstart", [text]).rewards[1].gates == {"arithmetic_answer": 1.0}


@pytest.mark.parametrize(
    ("rewards", "keys", "message"),
    [
        ([A, {**B, "requires": "aa"}], {}, r"b requires 'aa', which is no reward of this recipe \(a, b\)"),
        ([{**A, "requires": "b"}, {**B, "requires": {"a": 1}}], {}, "a requires b requires a, a circle"),
        ([A, {**B, "requires": "b"}], {}, "b requires b, a circle in which none would count"),
        *(
            (
                [A, {**B, "requires": wrong}],
                {},
                r"rewards\[1\].requires: got .*; give the name of another reward, or {NAME",
            )
            for wrong in (
                {},
                {"a": True},
                {"a": "x"},
                {"a": None},
                {"a": math.inf},
                {"a": NAN},
                {1: 1.0},
                5,
                True,
                ["a"],
                "",
            )
        ),
        ([{**A, "normalize": "prompt"}], {}, "normalize: got 'prompt'; it should be 'none', 'group' or 'batch'"),
        (
            [{**A, "normalize": "group"}],
            {"algorithm": "ppo", "generation": {"num_generations": 1}},
            "a: normalize: group compares .*num_generations is 1; take at least 2, or normalize: batch",
        ),
        (
            [{**A, "normalize": "batch"}],
            {"algorithm": "sft"},
            "a: normalize is for rewards that are learned from, and sft only evaluates",
        ),
    ],
)
def test_refused_gates(rewards, keys, message):
    with pytest.raises(UserError, match=message):
        recipe(*rewards, **keys)
