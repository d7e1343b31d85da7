import sys

import pytest

from lowmem_rlhf.data.tasks import generate
from lowmem_rlhf.errors import UserError


def arithmetic(split, seed=0, train_size=None, eval_size=100, **options):
    return generate("arithmetic", options, split, seed, train_size, eval_size)


def gym(split, seed=0, task="chain_sum", train_size=50, eval_size=20, **options):
    return generate(f"reasoning_gym/{task}", options, split, seed, train_size, eval_size)


def questions(rows):
    return [row["question"] for row in rows]


def test_arithmetic_splits_partition_the_problems():
    options = {"operations": ["+", "-", "*"], "low": -3, "high": 5}
    train, held_out = (questions(arithmetic(split, **options)) for split in ("train", "eval"))
    assert len(held_out) == 100
    assert not set(train) & set(held_out)
    assert len(set(train) | set(held_out)) == len(train) + len(held_out) == 3 * 9 * 9


def test_arithmetic_answers_are_right():
    for row in arithmetic("train", operations=["+", "-", "*"], low=-5, high=12):
        a, sign, b = row["question"].split()
        expected = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert row["answer"] == str(expected)


def test_arithmetic_is_a_function_of_the_seed():
    assert arithmetic("train") == arithmetic("train")
    assert arithmetic("eval") == arithmetic("eval")
    assert arithmetic("eval") != arithmetic("eval", seed=1)
    assert arithmetic("eval") == arithmetic("eval", train_size=7)


def test_arithmetic_sizes():
    assert len(arithmetic("train", train_size=7)) == 7
    assert len(arithmetic("train", low=0, high=10**9)) == 10_000
    assert len(set(questions(arithmetic("train", eval_size=0)))) == 400
    assert arithmetic("eval", eval_size=0) == []
    assert questions(arithmetic("train", operations="-", low=2, high=2, eval_size=0)) == ["2 - 2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": ["+"]}, r"no such option; did you mean 'operations'\? \(allowed: operations, low, high\)"),
        ({"operations": ["/"]}, r"operations: got \['/'\]; give a list of one or more of '\+', '-', '\*'"),
        ({"operations": []}, "operations: got"),
        ({"operations": 3}, "operations: got 3"),
        ({"low": 1.5}, "low: got 1.5; give a whole number"),
        ({"high": True}, "high: got True"),
        ({"low": 5, "high": 4}, "low is 5 and high is 4"),
        ({"low": 1, "high": 2}, "give 4 different problems .* set data.eval_size=2 or less"),
    ],
)
def test_arithmetic_refuses(options, message):
    with pytest.raises(UserError, match=message):
        arithmetic("train", **options)


def test_half_of_the_problems_can_be_held_out():
    assert len(arithmetic("eval", low=1, high=2, eval_size=2)) == 2
    assert len(arithmetic("train", low=1, high=2, eval_size=2)) == 2


def test_reasoning_gym_splits_are_disjoint_and_reproducible():
    pytest.importorskip("reasoning_gym", reason="the optional package reasoning-gym is not installed")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train, held_out = gym("train", **options), gym("eval", **options)
    assert (len(train), len(held_out)) == (50, 20)
    assert len(set(questions(train)) | set(questions(held_out))) == 70
    assert train == gym("train", **options)
    assert questions(gym("eval", seed=1, **options)) != questions(held_out)
    assert train[0]["task"] == "chain_sum" and train[0]["task_options"] == options
    assert train[0]["entry"]["answer"] == train[0]["answer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chain_sums"}, "'chain_sums' is no task of reasoning-gym .*did you mean 'chain_sum'"),
        ({"min_term": 2}, "min_term: reasoning_gym/chain_sum has no such option; did you mean 'min_terms'"),
        ({"size": 3}, "size: reasoning_gym/chain_sum has no such option"),
        ({"min_terms": -1}, "refuses {'min_terms': -1}: min_terms must be positive"),
        (
            {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "eval_size": 1000},
            "gave only [0-9]+ different problems",
        ),
    ],
)
def test_reasoning_gym_refuses(arguments, message):
    pytest.importorskip("reasoning_gym", reason="the optional package reasoning-gym is not installed")
    with pytest.raises(UserError, match=message):
        gym("train", **arguments)


def test_reasoning_gym_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="run: pip install reasoning-gym"):
        gym("train")
