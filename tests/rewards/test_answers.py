from fractions import Fraction

import pytest

from lowmem_rlhf.rewards.answers import parse_number, same_value, stated_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" $18 ", 18),
        ("18.0", 18),
        ("18.", 18),
        ("1,000", 1000),
        ("-1,234.5", Fraction("-1234.5")),
        ("-$5", -5),
        ("$-5", -5),
        ("−5", -5),
        ("20%", 20),
        ("3/4", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("1/0", None),
        ("1.5/2", None),
        ("1,2", None),
        ("-$-5", None),
        ("5 + 3", None),
        ("eighteen", None),
        ("", None),
        ("٣", None),
        ("1e999999999", None),
        ("9" * 10_000, None),
    ],
)
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("8", "8"),
        ("3 + 5 = 8", "8"),
        ("The answer is 8.", "8"),
        ("The answer is 8 = 5 + 3", "8"),
        ("The answer is 9 eggs * $2 = $18.", "18"),
        ("**Answer:** 18 eggs", "18"),
        ("Final answer: $1,000.\nGood luck with all 3!", "1000"),
        ("I have 9 eggs at $2.\n#### $18 a day", "18"),
        ("#### 17\nNo: #### 18", "18"),
        (r"So \boxed{18\text{ dollars}}, not 19", "18"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{1\frac{1}{2}}", "1.5"),
        (r"\boxed{\$1{,}000}", "1000"),
        (r"The answer is \(18\)", "18"),
        ("<think>It is 3. The answer is 4</think>It is 5", "5"),
        ("9 * 2 = $<<9*2=18>>18 every day", "18"),
        ("- 18", "18"),
        ("9 - 14 = -5", "-5"),
        ("it costs $5 for 5 people", "5"),
        # An expression that was left uncomputed is not an answer.
        ("5 + 3", None),
        ("0 + 3", None),
        ("6 -3", None),
        ("The answer is 5 + 3", None),
        ("#### 5 * 3", None),
        (r"\boxed{5 \times 3}", None),
        (r"\boxed{9^{9^{9^{9}}}}", None),
        (r"\boxed{1,2}", None),
        ("3 + 5 =", None),
        ("<think>8</think>", None),
        ("no number", None),
        ("####", None),
        (r"\boxed{", None),
        ("", None),
    ],
)
def test_stated_answer(text, answer):
    stated = stated_answer(text)
    assert stated is None if answer is None else same_value(answer, stated), stated


def test_same_value():
    assert same_value("1,000", "1000") and same_value("18", "$18.00") and same_value("0.5", r"\frac{1}{2}")
    assert not same_value("18", "18.01") and not same_value("18", None) and not same_value("eighteen", "18")


def test_same_value_off_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(same_value, "0.75", r"\frac{3}{4}").result()


@pytest.mark.parametrize(
    "unit", ["a", "(", "1/", "1,111", "9", r"\boxed{", "####", "answer is ", "{", "-", "**", "1 x "]
)
def test_long_texts_are_read_in_no_time(unit):
    """Quadratic time would take minutes."""
    from lowmem_rlhf.rewards.shipped import SHIPPED

    many = unit * (100_000 // len(unit))
    texts = [many, f"1{many}", f"{many} 1", f"#### {many}", rf"\boxed{{{many}}}", f"The answer is {many}"]
    for name in ("gsm8k_answer", "arithmetic_answer"):
        scores = SHIPPED[name](texts, answer=[r"\frac{1}{2}"] * len(texts))
        assert set(scores) <= {0.0, 1.0}


def test_math_verify_logs_as_before():
    import logging

    loggers = [logging.getLogger(name) for name in ("math_verify.parser", "math_verify.grader")]
    before = [logger.level for logger in loggers]
    assert same_value(r"\frac{1}{2}", "0.5")
    assert [logger.level for logger in loggers] == before != [logging.ERROR] * 2
