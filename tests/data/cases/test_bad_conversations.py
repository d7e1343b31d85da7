"""Conversations that nothing can be learned from: all of them are counted by their reason, and may be left out."""

import re

import pytest
from building import learned_runs, names_row, read, refusal, sft, talk, turn, warnings_of

from lowmem_rlhf.data.values import Row

GOOD = talk("Greet me.", "Good day.")
ROWS = [
    {"messages": GOOD},
    {"messages": talk("Name a river.", "The Elbe.", "Thank you!")},
    {"messages": [turn("assistant", "Welcome!"), *GOOD]},
    {"messages": []},
    {"messages": talk("Name a river.", "")},
    {"messages": talk("Name a port.", "Kiel.", "Thanks!")},
]
BAD = {
    "ends with the user": talk("Name a port.", "Kiel.", "Thanks!"),
    "begins with the assistant": [turn("assistant", "Welcome!"), *GOOD],
    "is empty": [],
    "has an empty answer": talk("Name a port.", "  \n"),
    "is a text": "Name a port. Kiel.",
    "is one message": turn("user", "Name a port."),
    "is nothing": None,
    "has a message without a content": [{"role": "user"}, turn("assistant", "Kiel.")],
    "has a message without a role": [{"content": "Name a port."}, turn("assistant", "Kiel.")],
    "has messages that are texts": ["Name a port.", "Kiel."],
    "has a number as its content": [turn("user", 5), turn("assistant", {"a": 1})],
    "is an answer alone": [turn("assistant", "Kiel.")],
    "is a question alone": talk("Name a port."),
    "is a system text alone": [turn("system", "Be brief.")],
    "ends in two answers": [*talk("Name a port.", "Kiel."), turn("assistant", "Or Emden.")],
    "ends with a tool": [*GOOD, turn("tool", "42")],
}


def test_all_reasons_at_once(tokenizer):
    message = refusal(sft, tokenizer("chatml"), ROWS)
    assert all(names_row(message, number) for number in (2, 3, 4, 5)), message
    assert not names_row(message, 6), "the first of each reason is named"
    assert re.search(r"\b2\b", message.replace("row 2", "")), "... and how many there are"
    assert "data.bad_rows=drop" in message


def test_they_are_left_out_and_counted(tokenizer, caplog):
    (kept,) = sft(tokenizer("chatml"), ROWS, bad_rows="drop")
    assert read(tokenizer("chatml"), kept)[1] == "Good day.<|im_end|>"
    (warning,) = [one for one in warnings_of(caplog) if names_row(one, 2)]
    assert all(names_row(warning, number) for number in (3, 4, 5)), warning
    assert re.search(r"\b5\b", warning.replace("row 5", "")) and re.search(r"\b2\b", warning.replace("row 2", ""))


@pytest.mark.parametrize("learn", ["last", "all"])
@pytest.mark.parametrize("reason", BAD)
def test_each_kind(tokenizer, caplog, reason, learn):
    rows = [{"messages": GOOD}, {"messages": BAD[reason]}]
    message = refusal(sft, tokenizer("chatml"), rows, learn=learn)
    assert names_row(message, 2) and not names_row(message, 1), message
    (kept,) = sft(tokenizer("chatml"), rows, learn=learn, bad_rows="drop")
    assert [tokenizer("chatml").decode(run) for run in learned_runs(kept)] == ["Good day.<|im_end|>"]
    assert [one for one in warnings_of(caplog) if names_row(one, 2)]
    assert names_row(refusal(sft, tokenizer("chatml"), rows[1:], learn=learn, bad_rows="drop"), 1)


def test_too_long_is_one_of_the_reasons(tokenizer, caplog):
    rows = [{"messages": GOOD}, {"messages": talk("Count.", "one two " * 60)}, {"messages": []}]
    message = refusal(sft, tokenizer("chatml"), rows, max_length=60)
    assert names_row(message, 2) and names_row(message, 3) and "sft.max_length" in message
    assert len(sft(tokenizer("chatml"), rows, max_length=60, bad_rows="drop")) == 1
    said = " ".join(warnings_of(caplog))
    assert names_row(said, 2) and names_row(said, 3)
    # long ones alone may be dropped, as before
    assert len(sft(tokenizer("chatml"), rows[:2], max_length=60, long_prompts="drop")) == 1
    message = refusal(sft, tokenizer("chatml"), rows, max_length=60, long_prompts="drop")
    assert names_row(message, 3) and not names_row(message, 2)


def test_a_row_is_named_by_its_number_in_the_file(tokenizer, caplog):
    rows = [Row({"messages": GOOD}, 12), Row({"messages": []}, 47), Row({"messages": talk("Who?")}, 5)]
    message = refusal(sft, tokenizer("chatml"), rows)
    assert names_row(message, 47) and names_row(message, 5) and not names_row(message, 2)
    sft(tokenizer("chatml"), rows, bad_rows="drop")
    assert [one for one in warnings_of(caplog) if names_row(one, 47)]


def test_good_rows_say_nothing(tokenizer, caplog):
    assert len(sft(tokenizer("chatml"), [{"messages": GOOD}] * 3, bad_rows="drop")) == 3
    assert not warnings_of(caplog)
