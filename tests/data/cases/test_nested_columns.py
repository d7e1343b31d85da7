"""Columns that lie within others, named with dots."""

import pytest
from building import names_row, pairs, prompts, read, refusal, sft, talk

ROWS = [
    {
        "ask": {"text": "What is 2+3?", "turns": talk("What is 2+3?")},
        "reward_model": {"style": "rule", "ground_truth": "5"},
        "answers": {"text": ["five", "5"]},
        "talks": [{"messages": talk("What is 2+3?", "It is 5.")}],
    },
    {
        "ask": {"text": "What is 2+2?", "turns": talk("What is 2+2?")},
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "answers": {"text": ["four", "4"]},
        "talks": [{"messages": talk("What is 2+2?", "It is 4.")}],
    },
]


def test_a_reference_answer_within_a_column(tokenizer):
    made = prompts(tokenizer("chatml"), ROWS, prompt="ask.turns", answer="reward_model.ground_truth")
    assert [one.columns["answer"] for one in made] == ["5", "4"]
    assert [one.prompt for one in made] == [talk("What is 2+3?"), talk("What is 2+2?")]
    assert made[0].columns["reward_model"] == ROWS[0]["reward_model"]


@pytest.mark.parametrize(
    ("data", "learned"),
    [
        ({"prompt": "ask.text", "completion": "answers.text.0"}, "five<|im_end|>"),
        ({"prompt": "ask.turns", "completion": "reward_model.ground_truth"}, "5<|im_end|>"),
        ({"template": "Say: {ask.text}", "completion": "answers.text.1"}, "5<|im_end|>"),
        ({"messages": "talks.0.messages"}, "It is 5.<|im_end|>"),
    ],
)
def test_what_is_learned_within_a_column(tokenizer, data, learned):
    prompt, completion = read(tokenizer("chatml"), sft(tokenizer("chatml"), ROWS, **data)[0])
    assert "What is 2+3?<|im_end|>" in prompt and completion == learned


def test_pairs_within_a_column(tokenizer):
    names = {"prompt": "ask.text", "chosen": "answers.text.0", "rejected": "reward_model.style"}
    (pair, _) = pairs(tokenizer("chatml"), ROWS, **names)
    assert tokenizer("chatml").decode(pair.chosen_ids + pair.rejected_ids) == "five<|im_end|>rule<|im_end|>"


def test_a_column_whose_name_has_a_dot_comes_first(tokenizer):
    rows = [{"q": "Who?", "a.b": "outer", "a": {"b": "inner"}}]
    (made,) = prompts(tokenizer("chatml"), rows, prompt="q", answer="a.b")
    assert made.columns["answer"] == "outer"


@pytest.mark.parametrize("name", ["reward_model.ground_thruth", "reward_modell.ground_truth", "answers.text.7"])
def test_a_mistyped_part_is_refused(tokenizer, name):
    message = refusal(prompts, tokenizer("chatml"), ROWS, prompt="ask.text", answer=name)
    assert "data.answer" in message and name in message


def test_a_part_that_one_row_lacks(tokenizer, caplog):
    rows = [*ROWS, {**ROWS[0], "ask": {"text": None, "turns": None}}, {**ROWS[0], "ask": None}]
    for data in ({"prompt": "ask.text"}, {"prompt": "ask.turns"}, {"template": "{ask.text}"}):
        assert names_row(refusal(prompts, tokenizer("chatml"), rows, **data), 3)
        assert len(prompts(tokenizer("chatml"), rows, bad_rows="drop", **data)) == 2
