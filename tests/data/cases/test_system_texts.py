"""System texts: one that a template puts in of its own, an empty one in its place, and one that is left out."""

import pytest
from building import names_row, prompts, sft, talk, turn, warnings_of

from lowmem_rlhf.errors import UserError

OWN = "You are a small helper"
ROWS = [{"prompt": "What is 2+3?", "completion": "5"}]
EMPTY = [{"prompt": [turn("system", ""), turn("user", "What is 2+3?")], "completion": "5"}]
SILENT = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
CUT = "{% for m in messages %}[{{ m.role }}]{{ m.content[:5] if m.role == 'system' else m.content }}{% endfor %}"


@pytest.mark.parametrize("name", ["own_system", "insists", "chatml"])
@pytest.mark.parametrize(("rows", "system"), [(ROWS, ""), (EMPTY, None), (EMPTY, "")])
@pytest.mark.parametrize("make", [prompts, sft])
def test_an_empty_system_text_replaces_the_templates_own(tokenizer, caplog, name, rows, system, make):
    try:
        (made,) = make(tokenizer(name), rows, system=system)
    except UserError as error:
        assert name == "insists" and "system" in str(error), error
        return
    text = tokenizer(name).decode(made.prompt_ids)
    assert OWN not in text or (name == "insists" and warnings_of(caplog)), text
    assert text.endswith("<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["own_system", "insists"])
def test_without_a_system_text_the_templates_own_stays(tokenizer, name):
    (made,) = prompts(tokenizer(name), ROWS)
    assert made.text.startswith(f"<|im_start|>system\n{OWN}<|im_end|>\n")
    (made,) = prompts(tokenizer(name), ROWS, system="Be brief.")
    assert made.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_an_empty_system_text_before_a_plain_prompt_is_none(tokenizer):
    (made,) = prompts(tokenizer("plain"), ROWS, system="")
    assert made.text == "What is 2+3?"


def test_the_rows_system_text_goes_before_the_recipes(tokenizer):
    rows = [{"prompt": talk("A port?", system="Be kind.")}]
    (made,) = prompts(tokenizer("chatml"), rows, system="Be brief.")
    assert "Be kind." in made.text and "Be brief." not in made.text


@pytest.mark.parametrize("template", [SILENT, CUT])
@pytest.mark.parametrize("rows", [ROWS, [{"prompt": talk("A port?", system="Be brief and kind."), "completion": "5"}]])
@pytest.mark.parametrize("make", [prompts, sft])
def test_a_template_that_leaves_it_out_is_refused_or_it_is_said(tokenizer, caplog, template, rows, make):
    try:
        make(tokenizer(template), rows, system="Be brief and kind.")
    except UserError as error:
        assert names_row(str(error), 1) and "system" in str(error) and "template" in str(error)
        return
    assert [one for one in warnings_of(caplog) if "system" in one and names_row(one, 1)]
