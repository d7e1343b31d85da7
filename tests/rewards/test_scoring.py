import copy
import math

import pytest

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.rewards import Reward, score

IDS = [[1, 2, 3], [1, 2]]


def chats(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def scored(*functions, weights=(), completions=("a", "b"), trainer_state=None, **columns):
    weights = weights or [1.0] * len(functions)
    rewards = [Reward(f"r{n}", f, w) for n, (f, w) in enumerate(zip(functions, weights, strict=True))]
    return score(rewards, ["p", "p"], list(completions), IDS, columns, trainer_state)


def test_weighted_sum_and_none():
    scores = scored(lambda completions, **_: [1.0, None], lambda completions, **_: [0.5, 2], weights=[2.0, -1.0])
    assert scores.by_name == {"r0": [1.0, None], "r1": [0.5, 2.0]}
    assert scores.total == [1.5, -2.0]


def test_no_function_applies():
    total = scored(lambda **_: [None, 1.0], lambda **_: [None, None]).total
    assert math.isnan(total[0]) and total[1] == 1.0


def test_totals_are_trls():
    """The same values through the lines of TRL 1.16's GRPOTrainer that sum them."""
    import torch

    rows: list[list[float | None]] = [[1.0, None, 0.25], [None, None, None], [None, -2.0, None]]
    weights = [1.0, 0.2, 3.0]
    columns = zip(*rows, strict=True)
    functions = [lambda values=column, **_: list(values) for column in columns]
    rewards = [Reward(str(n), f, w) for n, (f, w) in enumerate(zip(functions, weights, strict=True))]
    total = score(rewards, ["p"] * 3, ["c"] * 3, [[]] * 3, {}).total

    per_function = torch.tensor([[math.nan if value is None else value for value in row] for row in rows])
    expected = (per_function * torch.tensor(weights)).nansum(dim=1)
    expected[torch.isnan(per_function).all(dim=1)] = torch.nan
    torch.testing.assert_close(torch.tensor(total), expected, equal_nan=True)


def test_what_a_function_is_given():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, scale=1.0, **kwargs):
        seen.update(locals())
        return [scale, 0.0]

    rewards = [Reward("r", reward, options={"scale": 3.0})]
    columns: dict[str, list] = {"answer": ["1", "2"], "level": [5, 6], "completions": ["not", "these"]}
    assert score(rewards, ["p", "p"], ["a", "b"], IDS, columns, trainer_state="state").total == [3.0, 0.0]
    assert seen["completions"] == ["a", "b"] and seen["completion_ids"] == IDS and seen["answer"] == ["1", "2"]
    assert seen["trainer_state"] == "state" and seen["kwargs"]["level"] == [5, 6]


def test_a_function_without_kwargs_gets_what_it_names():
    def reward(completions, answer):
        return [float(text == reference) for text, reference in zip(completions, answer, strict=True)]

    assert scored(reward, answer=["a", "x"], level=[1, 2]).total == [1.0, 0.0]


def test_a_function_that_names_texts_gets_plain_texts():
    seen = []

    def reward(texts, answer, **columns):
        seen.append((texts, columns["completions"]))
        return [float(text == reference) for text, reference in zip(texts, answer, strict=True)]

    columns = {"answer": ["a", "x"], "texts": ["not", "these"]}
    assert scored(reward, completions=chats("a", "b"), **columns).total == [1.0, 0.0]
    assert scored(reward, completions=("a", "b"), **columns).total == [1.0, 0.0]
    assert seen == [(["a", "b"], chats("a", "b")), (["a", "b"], ["a", "b"])]


def test_other_functions_get_no_texts():
    seen = []

    def reward(completions, **columns):
        seen.append(columns)
        return [0.0 for _ in completions]

    scored(reward)
    scored(reward, texts=["1", "2"])
    assert "texts" not in seen[0] and seen[1]["texts"] == ["1", "2"]


def test_trls_own_functions_plug_in():
    from trl import rewards

    texts = chats(r"<think>so</think> \boxed{18}", r"\boxed{19}")
    scores = scored(
        rewards.accuracy_reward,
        rewards.think_format_reward,
        rewards.get_repetition_penalty_reward(ngram_size=2),
        rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2),
        completions=texts,
        solution=["$18$", "$18$"],
    )
    assert list(scores.by_name.values()) == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-0.5, 0.0]]
    assert scores.extra["solution"] == ["$18$", "$18$"]


def test_async_functions_and_metrics():
    async def reward(completions, log_metric, **kwargs):
        log_metric("half", 0.5)
        log_metric("half", 1.5)
        return [1.0 for _ in completions]

    scores = scored(reward)
    assert scores.total == [1.0, 1.0] and scores.metrics == {"half": 1.0}


def test_numbers_of_other_libraries():
    import numpy
    import torch

    assert scored(lambda **_: torch.tensor([1.0, 2.0])).total == [1.0, 2.0]
    assert scored(lambda **_: numpy.array([1, 2])).total == [1.0, 2.0]
    scores = scored(lambda **_: (True, numpy.float32(0.5)))
    assert scores.total == [1.0, 0.5] and all(type(value) is float for value in scores.by_name["r0"])


def raises(**_):
    raise KeyError("two\nlines")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"reward function r0 failed: KeyError: 'two"),
        (lambda answer, **_: [1.0, 1.0], "r0 failed: TypeError: .*missing 1 required positional argument: 'answer'"),
        (lambda **_: [1.0], "r0 returned 1 values for 2 completions"),
        (lambda **_: 1.0, "r0 returned a float; it must return a list of 2 numbers"),
        (lambda **_: None, "r0 returned a NoneType"),
        (lambda **_: "ab", "r0 returned a str"),
        (lambda **_: {"a": 1, "b": 2}, "r0 returned a dict"),
        (lambda **_: [1.0, "2"], "r0 returned '2' for completion 2"),
        (lambda **_: [[1.0], 1.0], r"r0 returned \[1.0\] for completion 1"),
        (lambda **_: [math.nan, 1.0], "r0 returned nan for completion 1; it must return a finite number, or None"),
        (lambda **_: [1.0, -math.inf], "r0 returned -inf for completion 2"),
    ],
)
def test_a_function_that_fails(function, message):
    with pytest.raises(RunError, match=message) as caught:
        scored(function)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_what_a_function_edits_is_seen_by_nobody_else():
    """Neither by the next function nor by who asked: ids are trained on, rows come again in later steps."""
    prompts = [[{"role": "user", "content": [{"type": "text", "text": "p"}]}] for _ in range(2)]
    given = {
        "prompts": prompts,
        "completions": chats("a", "b"),
        "prompt_ids": [[4, 5], [6]],
        "completion_ids": [[1, 2, 3], [1, 2]],
    }
    columns = {"answer": ["1", "2"], "entry": [{"numbers": [1, 2], "more": {"x": (1, [2])}}, {}], "tags": [["t"], []]}
    options = {"words": ["w"], "table": {"k": [1]}}
    asked, before = {**given, "columns": columns}, copy.deepcopy((given, columns, options))
    seen = []

    def vandal(prompts, completions, prompt_ids, completion_ids, answer, entry, tags, words, table, **_):
        seen.append(
            copy.deepcopy((prompts, completions, prompt_ids, completion_ids, answer, entry, tags, words, table))
        )
        prompts[0][0]["content"][0]["text"] = "other"
        completions[0][0]["content"] = "other"
        completions.pop()
        prompt_ids[0].clear()
        completion_ids[0].append(9)
        completion_ids[1][0] = 7
        answer[0] = entry[0]["more"]["x"][1][0] = "other"
        entry[0]["numbers"].append(3)
        tags.clear()
        words.append("other")
        table["k"].append(2)
        return [0.0, 1.0]

    scores = score([Reward("one", vandal, options=options), Reward("two", vandal, options=options)], **asked)
    assert scores.total == [0.0, 2.0]
    assert seen[0] == seen[1]
    assert (given, columns, options) == before
