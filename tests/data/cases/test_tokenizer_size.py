"""A tokenizer with more tokens than the model's embedding has rows is refused before anything is written."""

import pytest

USES = [
    {"question": "Call <tool>x</tool>.", "answer": "<tool>y</tool>"},
    {"question": "Name a port.", "answer": "Kiel"},
]
ANSWERS = [{"question": "Call it.", "answer": "<tool>y</tool>"}, {"question": "Name a port.", "answer": "Kiel"}]


@pytest.mark.parametrize(
    ("algorithm", "rows"), [("sft", USES), ("sft", ANSWERS), ("grpo", USES), ("reward_model", None)]
)
def test_it_is_refused_by_its_tokens(command, algorithm, rows):
    rows = rows or [{"question": "Call it.", "chosen": "<tool>y</tool>", "rejected": "no"}] * 2
    done = command("train", "tools_added", rows, algorithm=algorithm, data={"prompt": "question"})
    assert done.code == 2, done
    assert "<tool>" in done.err and "embedding" in done.err
    assert done.err.count("\n") == 1
    assert not done.run.exists()


@pytest.mark.parametrize("verb", [("train", "--dry-run"), ("plan",), ("data",)])
def test_before_the_run_too(command, verb):
    done = command(verb[0], "tools_added", USES, *verb[1:], data={"prompt": "question"})
    assert done.code == 2 and "<tool>" in done.err, done
    assert not done.run.exists()
