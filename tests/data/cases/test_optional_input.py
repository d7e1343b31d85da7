"""Instruction data with a second column that is empty in most rows."""

import pytest
from building import names_row, prompts, read, refusal, sft, warnings_of

ROWS = [
    {"instruction": "Name a metal.", "input": "", "output": "Iron."},
    {"instruction": "Say it in Italian.", "input": "bread", "output": "pane"},
    {"instruction": "Greet me.", "input": "", "output": "Good day."},
]
ALPACA = {"template": "{instruction}\n\n{input?}", "completion": "output"}


def user(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_an_empty_input_leaves_no_blank_lines(tokenizer):
    made = sft(tokenizer("chatml"), ROWS, **ALPACA)
    assert [read(tokenizer("chatml"), one) for one in made] == [
        (user("Name a metal."), "Iron.<|im_end|>"),
        (user("Say it in Italian.\n\nbread"), "pane<|im_end|>"),
        (user("Greet me."), "Good day.<|im_end|>"),
    ]
    plain = sft(tokenizer("plain"), ROWS, **ALPACA)
    assert read(tokenizer("plain"), plain[0]) == ("Name a metal.", "\nIron.<|im_end|>")


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("{instruction}\n\n{input?}", {"instruction": "Greet me.", "input": None}, "Greet me."),
        ("{instruction}\n\n{input?}", {"instruction": "Greet me.", "input": " \n"}, "Greet me."),
        ("{context?}\n\n{question}", {"context": "", "question": "Who?"}, "Who?"),
        ("{context?}\n\n{question}", {"context": "A text.", "question": "Who?"}, "A text.\n\nWho?"),
        ("Ask: {question}\n\n{hint?}\n\nAnswer:", {"question": "Who?", "hint": ""}, "Ask: Who?\n\nAnswer:"),
        ("{a?}\n{b?}\n{c?}", {"a": "", "b": "x", "c": ""}, "x"),
        ("{{{a}}} {b?}", {"a": "x", "b": "y"}, "{x} y"),
    ],
)
def test_where_an_optional_column_stands_does_not_matter(tokenizer, template, row, text):
    for name, expected in (("chatml", user(text)), ("plain", text)):
        (prompt,) = prompts(tokenizer(name), [row], template=template)
        assert prompt.text == expected
        assert tokenizer(name).decode(prompt.prompt_ids) == expected


def test_a_row_that_lacks_only_the_optional_column_is_taken(tokenizer):
    rows = [{"instruction": "Greet me.", "output": "Hi."}, *ROWS]
    assert read(tokenizer("chatml"), sft(tokenizer("chatml"), rows, **ALPACA)[0])[0] == user("Greet me.")


def test_a_prompt_that_is_empty_as_a_whole_is_still_refused(tokenizer):
    rows = [*ROWS, {"instruction": "", "input": "", "output": "What?"}]
    for template in ("{instruction?}\n\n{input?}", ALPACA["template"]):
        message = refusal(sft, tokenizer("chatml"), rows, **{**ALPACA, "template": template})
        assert names_row(message, 4) and "empty" in message


def test_an_empty_column_that_is_no_optional_one_says_how_it_may_be(tokenizer):
    message = refusal(sft, tokenizer("chatml"), ROWS, **{**ALPACA, "template": "{instruction}\n\n{input}"})
    assert names_row(message, 1) and "{input?}" in message


def test_such_rows_may_be_left_out(tokenizer, caplog):
    settings = {**ALPACA, "template": "{instruction}\n\n{input}", "bad_rows": "drop"}
    (kept,) = sft(tokenizer("chatml"), ROWS, **settings)
    assert read(tokenizer("chatml"), kept)[1] == "pane<|im_end|>"
    (warning,) = [one for one in warnings_of(caplog) if names_row(one, 1)]
    assert "2" in warning and "input" in warning
