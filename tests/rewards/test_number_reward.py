r"""The reward `numbers`: where it looks for the answer, its tolerance, and expressions that nobody should compute."""

import math

import pytest

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.sections import RewardConfig
from lowmem_rlhf.rewards import load_rewards
from lowmem_rlhf.rewards.answers import stated_answer, value_of
from lowmem_rlhf.rewards.references import check_run_references


def reward(**options):
    return load_rewards([RewardConfig(function="numbers", options=options)])[0]


def values(texts, references, **options):
    return reward(**options).function(texts, answer=references)


def test_the_answer_is_taken_from_where_the_option_says():
    text = r"<answer>1</answer> \boxed{2} the answer is 3, that is #### 4" + "\nin 5 steps"
    wanted = {"stated": 4, "boxed": 2, "tag": 1, "last": 5}
    for take, right in wanted.items():
        assert values([text], [right], take=take) == [1.0], take
        assert values([text] * 5, [n for n in range(6) if n != right], take=take) == [0.0] * 5, take
    assert values(["5", "<x>5", "<x>the answer is 5</x>"], [5] * 3, take="tag", tag="x") == [0.0, 0.0, 1.0]
    assert values(["5", r"\boxed{5"], [5] * 2, take="boxed") == [0.0, 0.0]
    assert values(["<think>7</think>5"], [7], take="last") == [0.0]


def test_the_tolerance_is_that_of_isclose_in_decimals():
    texts = ["99", "98.99", "101", "1.01e2"]
    assert values(texts, [100] * 4) == [0.0] * 4
    assert values(texts, [100] * 4, relative=0.01) == [1.0, 0.0, 1.0, 1.0]
    assert values(texts, [100] * 4, absolute=1.01) == [1.0] * 4
    assert values(["0.3", "0.1"], ["0.1", "0.4"], absolute=0.2) == [1.0, 0.0]  # 0.3 - 0.1 > 0.2 as floats
    assert values(["0.001", "0"], [0, 0], relative=0.5) == [0.0, 1.0]
    assert values(["9" * 60, "1e999"], ["1e300", "1e999"], relative=0.1) == [0.0, 1.0]


def test_latex_and_powers_of_ten():
    texts = [r"\boxed{0.33}", r"\boxed{\frac{1}{3}}", r"\boxed{\frac{2}{6}}", r"\boxed{\frac{1}{0}}"]
    assert values(texts, [r"\frac{1}{3}"] * 4) == [0.0, 1.0, 1.0, 0.0]
    assert values(texts, [r"\frac{1}{3}"] * 4, relative=0.02) == [1.0, 1.0, 1.0, 0.0]
    forms = [r"$c = 2.998 \times 10^{8}$ m/s", "2.998e8", "2.998 * 10**8", "299,800,000", "2.998 x 10^9"]
    assert values(forms, ["3e8"] * 5, relative=0.001) == [1.0] * 4 + [0.0]
    for text, value in ((r"-2\sqrt{2}", -(8**0.5)), (r"3\pi", 3 * math.pi), (r"1\frac{1}{2}", 1.5), ("20%", 20)):
        assert math.isclose(value_of(text), value), text
    assert value_of("x + 1") is value_of(r"\frac{1}{0}") is None


@pytest.mark.parametrize(
    "text",
    [
        *("9**9**9**9", "9^9^9^9", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{9**9**9**9}", "factorial(10**9)", "9e9999999"),
        *("9" * 10_000, r"\boxed{\frac{" * 5000, "1e" * 5000, "(" * 5000, "9" * 5000 + "**" + "9" * 5000),
    ],
)
@pytest.mark.parametrize("take", ["stated", "last", "boxed"])
def test_an_expression_is_no_answer_and_is_not_computed(text, take):
    assert values([text] * 3, ["9", "9999", "99999999"], take=take, relative=0.01) == [0.0] * 3


def test_two_stars_are_bold_type_but_between_operands():
    assert [stated_answer(text) for text in ("**18**", "step 5: **18**", "9**2", "9 ** 2", "(3)**2")] == [
        *("18", "18"),
        *(None,) * 3,
    ]


def test_a_row_without_a_number_has_no_value():
    assert values(["1"] * 4, [None, "none", "so it is\n#### 1", 1.0]) == [None, None, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative": -0.1}, "relative: got -0.1; give a number of at least 0"),
        ({"absolute": "x"}, "option absolute: got 'x'; give a number"),
        ({"take": "first"}, "take: got 'first'; give 'stated' or 'boxed' or 'tag' or 'last'"),
        ({"tag": "<a>"}, "tag: got '<a>'; give a name such as 'answer', without brackets"),
        ({"column": ""}, "column: got ''; name a column"),
        ({"tolerance": 1.0}, "numbers has no option 'tolerance'"),
    ],
)
def test_what_the_options_refuse(options, message):
    with pytest.raises(UserError) as caught:
        reward(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_references_that_are_no_numbers_are_found_before_the_run():
    recipe = validate_recipe({"model": "m", "data": {"train": "arithmetic"}, "rewards": ["numbers"]})
    rewards = load_rewards(recipe.rewards)
    with pytest.raises(UserError, match=r"numbers reads none of the 2 reference answers \(first, row 1: 'Paris'\)"):
        check_run_references(rewards, recipe, [{"answer": "Paris"}, {"answer": "Rome"}])
    assert check_run_references(rewards, recipe, [{"answer": 1}, {"answer": "Rome"}]) == [
        "rewards: numbers reads 1 of the 2 reference answers and does not apply to the others (first, row 2: 'Rome')"
    ]
