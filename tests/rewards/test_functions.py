import json
import random
import string
from pathlib import Path

import pytest

from lowmem_rlhf.rewards.functions import arithmetic_answer, gsm8k_answer, length, think_format
from lowmem_rlhf.rewards.shipped import FUNCTIONS

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"


def chat(text):
    return [{"role": "assistant", "content": text}]


def gsm8k(name):
    if not GSM8K.is_dir():
        pytest.skip("the shared test data is not there")
    return [json.loads(line) for line in (GSM8K / name).read_text(encoding="utf-8").splitlines()]


def test_every_function_takes_chat_and_plain_completions():
    pytest.importorskip("reasoning_gym", reason="the optional package reasoning-gym is not installed")
    text = "<think>a</think>8"
    for name, function in FUNCTIONS.items():
        columns = {"answer": ["8"], "task": ["chain_sum"], "task_options": [{}], "entry": [{"answer": "8"}]}
        options = {"target": 10} if name == "length" else {}
        plain, message = (
            function(prompts=["p"], completions=[completion], completion_ids=[[1] * 10], **columns, **options)
            for completion in (text, chat(text))
        )
        assert plain == message == [1.0], name


def test_arithmetic_answer():
    completions = ["8", "3 + 5 = 8", "5 + 3", "9", "", "8 or 9", "8.0"]
    assert arithmetic_answer(completions, ["8"] * 7) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert arithmetic_answer(["8", "8"], [8, None]) == [1.0, None]


def test_gsm8k_answer():
    assert gsm8k_answer(["#### 18", "so 18", "19"], ["9*2\n#### 18", "18", "#### 18"]) == [1.0, 1.0, 0.0]
    assert gsm8k_answer(["#### 1000"], ["so #### 1,000"]) == [1.0]
    assert gsm8k_answer(["18", "18"], ["no number", None]) == [None, None]


def test_gsm8k_reference_solutions_solve_their_problem_and_no_other():
    answers = [row["answer"] for row in gsm8k("test.jsonl")]
    assert gsm8k_answer(answers, answers) == [1.0] * 1319
    others = gsm8k_answer(answers[1:], answers[:-1])
    assert sum(value for value in others if value) < 0.05 * len(others)


def test_gsm8k_correct_solutions_score_above_wrong_ones():
    answer_to = {row["question"]: row["answer"] for row in gsm8k("test.jsonl")}
    pairs = gsm8k("preferences.jsonl")
    answers = [answer_to[pair["prompt"]] for pair in pairs]
    chosen, rejected = (gsm8k_answer([pair[key] for pair in pairs], answers) for key in ("chosen", "rejected"))
    assert chosen == [1.0] * 731
    assert rejected == [0.0] * 731


def test_answers_never_raise():
    draw = random.Random(0)
    pieces = ["####", r"\boxed{", r"\frac{1}{0}", "{", "}", "$", "=", "</think>", "answer is", "1,", "-", "/", "\n"]
    alphabet = [*pieces, *string.printable, "−", "\x00", "٣", "\ud800", "9" * 400]
    odd = ["".join(draw.choices(alphabet, k=draw.randrange(30))) for _ in range(3000)]
    for function in (arithmetic_answer, gsm8k_answer):
        assert set(function(odd, ["#### 18" if function is gsm8k_answer else "18"] * 3000)) <= {0.0, 1.0}
        assert set(function(["18"] * 3000, odd)) <= {0.0, 1.0, None}


def test_think_format_is_trls():
    from trl.rewards import think_format_reward

    texts = ["<think>a</think>b", "<think>\na\n</think>\n#### 3", "a", "<think>a", " <think>a</think>b"]
    texts.append("<think><think>a</think>b")
    assert think_format(texts) == think_format_reward([chat(text) for text in texts])
    assert think_format(texts)[:3] == [1.0, 1.0, 0.0]


def test_length():
    ids = [[0] * n for n in (0, 5, 10, 15, 20, 50)]
    texts = [""] * 6
    assert length(texts, ids, target=10) == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    assert length(texts, ids, target=10, prefer="below") == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert length(["ab", chat("abcd")], [[], []], target=4, unit="characters") == [0.5, 1.0]


def test_reasoning_gym_answer():
    pytest.importorskip("reasoning_gym", reason="the optional package reasoning-gym is not installed")
    from lowmem_rlhf.data.tasks import generate

    for task in ("chain_sum", "spell_backward", "countdown"):
        rows = generate(f"reasoning_gym/{task}", {}, "train", 0, 4, 0)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        function = FUNCTIONS["reasoning_gym_answer"]
        right = [f"<think>hm</think>So <answer>{row['answer']}</answer>" for row in rows]
        assert function(completions=right, **columns) == [1.0] * 4, task
        assert function(completions=[row["answer"] for row in rows], **columns) == [1.0] * 4, task
        assert all(value < 0.5 for value in function(completions=["<answer>?!</answer>"] * 4, **columns)), task


def test_an_answer_that_would_be_computed_for_ever_is_wrong():
    pytest.importorskip("reasoning_gym")
    from lowmem_rlhf.data.tasks import reasoning_gym_task
    from lowmem_rlhf.rewards.functions import reasoning_gym_answer

    hostile = ["9**9**9**9", "(9**99)**99**9", "9^9^9^9", "factorial(10**9)", "99999999!!", "exit()", "[9**9**9**9]"]
    hostile += ["__import__('os')", "1+" * 50_000 + "1", "(" * 100_000, "[[0]*10**10]"]
    for task in ("countdown", "puzzle24", "simple_integration", "polynomial_multiplication", "spiral_matrix"):
        problem = reasoning_gym_task(task, {})[0]
        count = len(hostile)
        scores = reasoning_gym_answer(hostile, [task] * count, [{}] * count, [problem] * count)
        assert max(scores) <= 0.05, (task, scores)
        assert reasoning_gym_answer([problem["answer"]], [task], [{}], [problem]) == [1.0]


@pytest.mark.parametrize(
    ("task", "answer", "evaluable"),
    [
        ("simple_integration", "x**5/5 + 3*x**(1/2) - sin(x)*exp(2*x) + C", True),
        ("polynomial_multiplication", "(x + 1)**2 * (y - 3)^12 + 2**n", True),
        ("polynomial_multiplication", "x**100000", False),
        ("polynomial_multiplication", "((x**99)**99)**99", True),
        ("polynomial_multiplication", "(((9**99)**99)**99)**99", False),
        ("polynomial_multiplication", "9**(9**9)", False),
        ("polynomial_multiplication", "gamma(99999)", False),
        ("countdown", "(25 + 3) * 4 - 1/2", True),
        ("countdown", "2**3", False),
        ("n_queens", "[['Q', '_'], ['_', 'Q']]", True),
        ("n_queens", "exit()", False),
        ("caesar_cipher", "9**9**9**9 (any text)", True),
    ],
)
def test_which_answers_are_evaluated(task, answer, evaluable):
    from lowmem_rlhf.rewards.evaluated_answers import is_evaluable

    assert is_evaluable(task, answer) == evaluable
