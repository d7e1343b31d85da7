"""Prompts that end in an answer of the assistant that is to be gone on with, and templates that rewrite it."""

import pytest
from building import names_row, prompts, refusal, sft, talk, turn, warnings_of

from lowmem_rlhf.errors import UserError

BEGUN = [
    "<think>\n",
    "<think>\n\n</think>",
    "<think>\n\n</think>\n\n",
    "<think>\nTwo and three.\n</think>\n\nThe answer is",
    "<think>\nTwo and",
    "The answer is",
    " The answer is ",
    "The answer is\n\n",
]
TEMPLATES = ["chatml", "thinks", "forgets", "forgets_and_opens", "own_system", "insists", "tools"]


@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_ends_as_the_answer_was_begun_or_is_refused(tokenizer, name, begun):
    rows = [{"prompt": talk("What is 2+3?")}, {"prompt": talk("What is 2+3?", begun)}]
    try:
        prompt = prompts(tokenizer(name), rows)[1]
    except UserError as error:
        assert names_row(str(error), 2) and "template" in str(error), error
        assert name not in ("chatml", "own_system", "insists", "tools"), "nothing is rewritten here"
        return
    text = tokenizer(name).decode(prompt.prompt_ids)
    assert text.endswith(f"<|im_start|>assistant\n{begun}"), text
    assert text.count("<think>") == begun.count("<think>")
    assert prompt.text == text


@pytest.mark.parametrize("name", ["chatml", "thinks", "forgets"])
def test_a_row_that_is_refused_may_be_left_out(tokenizer, name, caplog):
    rows = [{"prompt": talk("What is 2+3?")}, {"prompt": talk("What is 2+3?", "<think>\n\n</think>")}]
    kept = prompts(tokenizer(name), rows, bad_rows="drop")
    assert kept[0].prompt == rows[0]["prompt"]
    assert len(kept) == 2 or [one for one in caplog.messages if names_row(one, 2)]


@pytest.mark.parametrize("begun", BEGUN)
def test_a_begun_answer_is_completed_in_sft(tokenizer, caplog, begun):
    rows = [{"prompt": talk("What is 2+3?", begun), "completion": "5."}]
    (example,) = sft(tokenizer("chatml"), rows)
    read = tokenizer("chatml").decode
    assert read(example.prompt_ids).endswith(f"<|im_start|>assistant\n{begun}")
    assert read(example.prompt_ids + example.completion_ids).endswith(f"{begun}5.<|im_end|>")
    assert not warnings_of(caplog), "nothing of it was rewritten"


def test_an_answer_in_place_of_a_question(tokenizer):
    rows = [{"prompt": [turn("user", "What is 2+3?"), turn("assistant", "")]}]
    try:
        (prompt,) = prompts(tokenizer("forgets"), rows)
    except UserError as error:
        assert names_row(str(error), 1)
        return
    assert tokenizer("forgets").decode(prompt.prompt_ids).endswith("<|im_start|>assistant\n")


def test_a_prompt_that_ends_in_a_finished_answer_is_pointed_out(tokenizer, said):
    rows = [{"prompt": talk("What is 2+3?", "It is 5.")}, {"prompt": talk("What is 2+3?")}]
    prompts(tokenizer("chatml"), rows)
    assert [one for one in said() if "assistant" in one and names_row(one, 1)]


def test_the_template_refuses_a_begun_answer(tokenizer):
    refuses = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no answers here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    message = refusal(prompts, tokenizer(refuses), [{"prompt": talk("Hi", "Well,")}])
    assert names_row(message, 1) and "no answers here" in message
