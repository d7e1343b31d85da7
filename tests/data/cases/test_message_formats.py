"""Conversations in the forms that sets of others have: ShareGPT, content parts, tool calls."""

import json

import pytest
from building import learned_runs, names_row, prompts, refusal, sft, talk, turn

SHARED = [
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello."},
    {"from": "human", "value": "Name a port."},
    {"from": "gpt", "value": "Kiel."},
]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Kiel", "days": 2}'}}
CALLED = [
    turn("user", "Will it rain?"),
    turn("assistant", None, tool_calls=[CALL]),
    turn("tool", "rain", tool_call_id="c1"),
    turn("assistant", "It will."),
]
OUT = "<call>look city=Kiel days=2</call>"


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def learned(tokenizer, messages, **settings):
    (example,) = sft(tokenizer, [{"messages": messages}], **settings)
    return [tokenizer.decode(run) for run in learned_runs(example)]


def test_from_and_value(tokenizer, said):
    assert learned(tokenizer("chatml"), SHARED, learn="all") == ["Hello.<|im_end|>", "Kiel.<|im_end|>"]
    assert len([one for one in said() if "'human' is taken as user" in one]) == 1
    (made,) = prompts(tokenizer("chatml"), [{"messages": SHARED}])
    same = talk("Hi", "Hello.", "Name a port.")
    assert made.text == tokenizer("chatml").apply_chat_template(same, tokenize=False, add_generation_prompt=True)


def test_from_and_value_with_a_system_text_and_keys_of_null(tokenizer):
    messages = [{"from": "system", "value": "Be brief."}, *({**one, "weight": None} for one in SHARED[:2])]
    (example,) = sft(tokenizer("chatml"), [{"talks": messages}], messages="talks")
    text = tokenizer("chatml").decode(example.prompt_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")


def test_from_and_value_in_other_places(tokenizer):
    (made,) = prompts(tokenizer("chatml"), [{"prompt": SHARED[:1]}])
    assert "<|im_start|>user\nHi<|im_end|>" in made.text
    (example,) = sft(tokenizer("chatml"), [{"prompt": SHARED[:1], "completion": SHARED[1:2]}])
    assert tokenizer("chatml").decode(example.completion_ids) == "Hello.<|im_end|>"


def test_role_and_value_mixed_up_is_refused(tokenizer):
    for bad in ({"from": "human", "content": "Hi"}, {"role": "user", "value": "Hi"}, {"from": "human"}):
        rows = [{"messages": SHARED}, {"messages": [bad, SHARED[1]]}]
        try:
            made = sft(tokenizer("chatml"), rows)
        except Exception as error:
            assert type(error).__name__ == "UserError" and names_row(str(error), 2)
        else:
            assert "value" not in bad or "user\nHi" in tokenizer("chatml").decode(made[1].prompt_ids)


def test_content_in_parts(tokenizer):
    messages = [turn("user", parts("Name a ", "port.")), turn("assistant", parts("Kiel."))]
    assert learned(tokenizer("chatml"), messages) == ["Kiel.<|im_end|>"]
    (made,) = prompts(tokenizer("chatml"), [{"messages": messages}])
    text = made.text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    assert text.split() == ["Name", "a", "port."]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "a.png"}}],
        [*parts("What is this?"), {"type": "image"}],
        [{"type": "text"}],
        [{"text": 5, "type": "text"}],
        [["Hi"]],
        {"text": "Hi"},
    ],
)
def test_parts_that_are_no_texts_are_refused(tokenizer, content):
    rows = [{"messages": talk("Hi", "Hello.")}, {"messages": [turn("user", content), turn("assistant", "A port.")]}]
    assert names_row(refusal(sft, tokenizer("chatml"), rows), 2)
    assert len(sft(tokenizer("chatml"), rows, bad_rows="drop")) == 1


def test_calls_with_arguments_as_json_text(tokenizer):
    assert learned(tokenizer("tools"), CALLED, learn="all") == [f"{OUT}<|im_end|>", "It will.<|im_end|>"]
    (made,) = prompts(tokenizer("tools"), [{"messages": CALLED}])
    assert f"<|im_start|>assistant\n{OUT}<|im_end|>\n<|im_start|>tool\nrain<|im_end|>" in made.text


@pytest.mark.parametrize("content", [None, "", "I look it up."])
@pytest.mark.parametrize("arguments", ['{"city": "Kiel", "days": 2}', {"city": "Kiel", "days": 2}])
def test_a_call_may_be_the_answer(tokenizer, content, arguments):
    call = {**CALL, "function": {"name": "look", "arguments": arguments}}
    messages = [turn("user", "Will it rain?"), turn("assistant", content, tool_calls=[call])]
    assert learned(tokenizer("tools"), messages) == [f"{content or ''}{OUT}<|im_end|>"]


def test_a_call_without_the_key_content(tokenizer):
    messages = [CALLED[0], {"role": "assistant", "tool_calls": [CALL]}, *CALLED[2:]]
    assert learned(tokenizer("tools"), messages, learn="all") == [f"{OUT}<|im_end|>", "It will.<|im_end|>"]


@pytest.mark.parametrize("tools", ["hammer and saw", ["hammer", "saw"], [], None, "", 7, {"hammer": 1}])
def test_a_column_of_tools_that_are_none_for_a_model(tokenizer, tools):
    row = {"messages": talk("Hi", "Hello."), "tools": tools}
    (example,) = sft(tokenizer("chatml"), [row])
    assert tokenizer("chatml").decode(example.completion_ids) == "Hello.<|im_end|>"


def test_a_call_that_the_template_does_not_write(tokenizer, said):
    from lowmem_rlhf.errors import UserError

    with pytest.raises(UserError) as caught:
        sft(tokenizer("chatml"), [{"messages": CALLED[:2]}])
    assert names_row(str(caught.value), 1)
    try:
        prompts(tokenizer("chatml"), [{"prompt": CALLED[:3]}])
    except UserError as error:
        assert names_row(str(error), 1)
    else:
        assert [one for one in said() if "tool" in one and names_row(one, 1)]


@pytest.mark.parametrize(
    "written", ["~ c.function.arguments", "+ c.function.arguments", "~ c.function.arguments|tojson"]
)
def test_arguments_are_json_however_the_template_writes_them(tokenizer, written):
    """Some templates write the text that OpenAI's messages have, and would show or refuse a mapping (DeepSeek-V3)."""
    made = tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name " + written + " }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (example,) = sft(made, [{"messages": CALLED[:2]}])
    assert made.decode(example.completion_ids) == 'look{"city": "Kiel", "days": 2}<|im_end|>'
    (example,) = sft(made, [{"messages": CALLED}])
    assert 'look{"city": "Kiel", "days": 2}<|im_end|>' in made.decode(example.prompt_ids)


def test_arguments_that_are_no_json(tokenizer):
    call = {**CALL, "function": {"name": "look", "arguments": '{"city": '}}
    rows = [{"messages": CALLED}, {"messages": [CALLED[0], turn("assistant", None, tool_calls=[call])]}]
    try:
        made = sft(tokenizer("tools"), rows)
    except Exception as error:
        assert type(error).__name__ == "UserError" and names_row(str(error), 2)
    else:
        assert '{"city": ' in tokenizer("tools").decode(made[1].completion_ids)


def test_a_conversation_as_json_text_is_read_or_refused(tokenizer):
    rows = [{"messages": json.dumps(talk("Hi", "Hello."))}]
    try:
        (example,) = sft(tokenizer("chatml"), rows)
    except Exception as error:
        assert type(error).__name__ == "UserError" and names_row(str(error), 1)
    else:
        assert tokenizer("chatml").decode(example.completion_ids) == "Hello.<|im_end|>"
