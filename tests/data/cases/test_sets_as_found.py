"""Conversations as they are found: calls as messages, weights, roles, empty ones, and those written as text."""

import json

import pytest
from building import learned_runs, names_row, pairs, prompts, read, refusal, sft, talk, turn

TALK = talk("Hi", "Hello.")
HH = "Human: Is lava cold?\n\nAssistant:"


def test_a_dialogue_without_the_empty_line_before_it(tokenizer):
    (pair,) = pairs(tokenizer("chatml"), [{"chosen": HH + " No.", "rejected": HH + " Yes."}], prompt=None)
    assert tokenizer("chatml").decode(pair.prompt_ids) == (
        "<|im_start|>user\nIs lava cold?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer("chatml").decode(pair.rejected_ids) == "Yes.<|im_end|>"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ('{"name": "look", "arguments": {"city": "Kiel"}}', "<call>look city=Kiel</call>"),
        ('{"name": "look", "arguments": "{\\"city\\": \\"Kiel\\"}"}', "<call>look city=Kiel</call>"),
        ('[{"name": "look"}, {"name": "ask"}]', "<call>look</call><call>ask</call>"),
    ],
)
@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_a_call_as_a_message(tokenizer, said, role, value, written):
    talk = [
        {"from": "human", "value": "Rain?"},
        {"from": role, "value": value},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It will."},
    ]
    (example,) = sft(tokenizer("tools"), [{"messages": talk}], learn="all")
    first, last = (tokenizer("tools").decode(run) for run in learned_runs(example))
    assert written in first and last.startswith("It will.")
    assert any("tool call" in line for line in said())
    bad = refusal(sft, tokenizer("tools"), [{"messages": [talk[0], {"from": role, "value": "look it up"}, talk[3]]}])
    assert names_row(bad, 1) and "not JSON" in bad


def test_a_developer_is_the_system(tokenizer):
    messages = [turn("developer", "Be brief."), *TALK]
    (example,) = sft(tokenizer("chatml"), [{"messages": messages}])
    assert read(tokenizer("chatml"), example)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("weight", [0, 0.0, "0"])
def test_what_is_weighed_is_learned(tokenizer, weight):
    light = [turn("user", "Hi"), turn("assistant", "Hello.", weight=1), turn("user", "Bye"),
             turn("assistant", "Ciao.", weight=weight)]  # fmt: skip
    (example,) = sft(tokenizer("chatml"), [{"messages": light}], learn="all")
    assert read(tokenizer("chatml"), example)[1] == "Hello.<|im_end|>"
    assert "sft.learn=all" in refusal(sft, tokenizer("chatml"), [{"messages": light}])
    nothing = [light[0], {**light[1], "weight": weight}]
    assert "weight 0" in refusal(sft, tokenizer("chatml"), [{"messages": nothing}], learn="all")


@pytest.mark.parametrize("messages", [[turn("user", "")], [turn("system", "Be brief."), turn("user", " \n")]])
def test_a_prompt_of_empty_messages(tokenizer, messages):
    whole = [{"messages": TALK}, {"messages": [*messages, turn("assistant", "Yes.")]}]
    assert names_row(refusal(sft, tokenizer("chatml"), whole), 2)
    assert names_row(refusal(prompts, tokenizer("chatml"), [{"prompt": "a"}, {"prompt": messages}]), 2)
    assert len(sft(tokenizer("chatml"), whole, bad_rows="drop")) == 1


def test_an_earlier_answer_that_is_empty(tokenizer):
    rows = [{"messages": talk("Hi", "", "Bye", "Ciao.")}]
    assert "message 2 of column 'messages' is an empty answer" in refusal(sft, tokenizer("chatml"), rows, learn="all")
    assert len(sft(tokenizer("chatml"), rows)) == 1


def test_two_answers_in_a_row_are_no_begun_answer(tokenizer):
    messages = [*TALK, turn("assistant", "And welcome."), *talk("Bye", "Ciao.")]
    assert "messages 2 and 3" in refusal(sft, tokenizer("chatml"), [{"messages": messages}], learn="all")
    (example,) = sft(tokenizer("chatml"), [{"messages": messages}])
    assert "Hello.<|im_end|>\n<|im_start|>assistant\nAnd welcome.<|im_end|>" in read(tokenizer("chatml"), example)[0]


def test_messages_that_are_written_as_text(tokenizer, said):
    (example,) = sft(tokenizer("chatml"), [{"messages": json.dumps(TALK)}])
    assert read(tokenizer("chatml"), example)[1] == "Hello.<|im_end|>"
    assert "json.dumps" in refusal(sft, tokenizer("chatml"), [{"messages": str(TALK)}])
    assert "no messages" in refusal(sft, tokenizer("chatml"), [{"messages": []}])
    written = [json.dumps(TALK[:1]), str(TALK[:1]), "[{'role': me"]
    for prompt, text in zip(prompts(tokenizer("chatml"), [{"prompt": text} for text in written]), written, strict=True):
        assert f"user\n{text}<|im_end|>" in prompt.text
    assert [line for line in said() if "'prompt'" in line and "written out" in line and "3 of 3" in line]


@pytest.mark.parametrize("name", ["system", "system_prompt", "history"])
def test_a_column_that_no_prompt_is_made_of_is_said(tokenizer, said, name):
    rows = [
        {"prompt": "Hi", "completion": "Hello.", name: ""},
        {"prompt": "Hi", "completion": "Hey.", name: "Be kind."},
    ]
    sft(tokenizer("chatml"), rows[:1])
    sft(tokenizer("chatml"), rows, template=f"{{{name}?}}\n\n{{prompt}}")
    assert not [line for line in said() if repr(name) in line]
    sft(tokenizer("chatml"), rows)
    assert [line for line in said() if repr(name) in line and "row 2" in line]


def test_the_part_of_an_answer_is_named(tokenizer):
    row = {"prompt": "Hi", "chosen": turn("assistant", "Hello."), "rejected": turn("assistant", "No.")}
    assert "chosen.content" in refusal(pairs, tokenizer("chatml"), [row])
    assert len(pairs(tokenizer("chatml"), [row], chosen="chosen.content", rejected="rejected.content")) == 1
