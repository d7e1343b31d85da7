"""Roles that a template has never seen are translated or refused; it never writes them unsaid."""

import pytest
from building import learned_runs, names_row, prompts, sft, talk, turn, warnings_of
from chat_families import FAMILIES, family_tokenizer

from lowmem_rlhf.errors import UserError

KNOWN = {
    "human": "user", "Human": "user", "User": "user", "USER": "user",
    "gpt": "assistant", "bot": "assistant", "Assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
    "System": "system",
}  # fmt: skip
UNKNOWN = ["narrator", "Developer", "critic", "", "user "]


@pytest.mark.parametrize("name", ["chatml", "thinks", "tools", "own_system"])
@pytest.mark.parametrize("role", [*KNOWN, *UNKNOWN])
def test_a_role_is_translated_or_refused(tokenizer, caplog, name, role):
    asked = [turn("user", "Hi"), turn("assistant", "Hello.")] if KNOWN.get(role) != "system" else []
    rows = [{"prompt": talk("Name a port.")}, {"prompt": [*asked, turn(role, "Be kind."), turn("user", "A port?")]}]
    try:
        made = prompts(tokenizer(name), rows)
    except UserError as error:
        assert names_row(str(error), 2) and repr(role) in str(error), error
        return
    text = made[1].text
    assert f"<|im_start|>{role}\n" not in text or warnings_of(caplog), text
    if role in KNOWN and f"<|im_start|>{role}\n" not in text:
        assert f"<|im_start|>{KNOWN[role]}\nBe kind.<|im_end|>" in text


@pytest.mark.parametrize("names", [("human", "gpt"), ("User", "Bot"), ("user", "model"), ("human", "assistant")])
def test_a_conversation_is_learned_under_any_names(tokenizer, names):
    user, assistant = names
    messages = [turn(user, "Hi"), turn(assistant, "Hello."), turn(user, "Name a port."), turn(assistant, "Kiel.")]
    try:
        (example,) = sft(tokenizer("chatml"), [{"messages": messages}], learn="all")
    except UserError as error:
        assert names_row(str(error), 1) and (user in str(error) or assistant in str(error))
        return
    runs = [tokenizer("chatml").decode(run) for run in learned_runs(example)]
    assert runs == ["Hello.<|im_end|>", "Kiel.<|im_end|>"]
    assert tokenizer("chatml").decode(example.prompt_ids).startswith("<|im_start|>user\nHi")


def test_a_translation_is_said_once(tokenizer, said):
    prompts(tokenizer("chatml"), [{"prompt": [turn("human", "Name a port.")]}] * 3)
    assert len([one for one in said() if "human" in one]) == 1


def test_roles_that_chat_models_have_are_left_alone(tokenizer, said):
    messages = [turn("system", "Be kind."), *talk("Weather?", "I look."), turn("tool", "rain"), turn("user", "So?")]
    (made,) = prompts(tokenizer("chatml"), [{"prompt": messages}])
    assert made.text == tokenizer("chatml").apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert not [one for one in said() if "role" in one]


def test_a_role_that_the_template_reads_may_be_used(tokenizer):
    critic = (
        "{% for m in messages %}{% if m.role == 'critic' %}{{ 'CRITIC ' + m.content }}{% else %}"
        "{{ m.role + ' ' + m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    try:
        (made,) = prompts(tokenizer(critic), [{"prompt": [turn("critic", "Hm."), turn("user", "A port?")]}])
    except UserError as error:
        assert names_row(str(error), 1) and "critic" in str(error)
        return
    assert made.text == "CRITIC Hm.<|im_end|>user A port?<|im_end|>assistant "


@pytest.mark.parametrize("name", ["gemma", "gemma3", "qwen2_5"])
def test_a_name_that_the_template_writes_itself_is_translated(name):
    """Gemma's templates know a model's turn as the assistant's, and quote the word for writing it."""
    made = family_tokenizer(FAMILIES[name])
    rows = [
        {"messages": [turn("user", "A port?"), turn("model", "Kiel."), turn("user", "A sea?"), turn("model", "Yes.")]}
    ]
    assert sft(made, rows) == sft(made, [{"messages": talk("A port?", "Kiel.", "A sea?", "Yes.")}])


@pytest.mark.parametrize("name", ["deepseekv3", "chatml"])
def test_a_function_is_a_tool_where_the_template_knows_tools(name):
    made = family_tokenizer(FAMILIES[name])
    calls = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
    before = [turn("user", "A port?"), turn("assistant", "look", tool_calls=calls)]
    texts = [
        prompts(made, [{"prompt": [*before, turn(role, "Kiel"), turn("user", "So?")]}])[0].text
        for role in ("function", "tool")
    ]
    assert texts[0] == texts[1] and "Kiel" in texts[0]


@pytest.mark.parametrize("role", [None, 3, ["user"]])
def test_what_is_no_name_of_a_role(tokenizer, caplog, role):
    rows = [{"prompt": talk("A port?")}, {"prompt": [{"role": role, "content": "A port?"}]}]
    with pytest.raises(UserError) as caught:
        prompts(tokenizer("chatml"), rows)
    assert names_row(str(caught.value), 2)
    assert len(prompts(tokenizer("chatml"), rows, bad_rows="drop")) == 1
