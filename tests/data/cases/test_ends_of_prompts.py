"""A prompt never ends in a stop, and what ends a turn is what the template writes there."""

import pytest
from building import config, pairs, prompts, read, sft, stops_of, talk

from lowmem_rlhf.data.supervised import labelled_texts
from lowmem_rlhf.errors import UserError

ROWS = [{"prompt": "What is 2+3?", "completion": "5"}, {"prompt": "Name a port.", "completion": "Kiel."}]
PLAIN = {"adds_eos": ("", "<|im_end|>"), "adds_both": ("<s>", "</s>")}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("data", [{}, {"system": "Be brief."}, {"template": "{prompt}\n"}])
def test_a_tokenizer_that_adds_its_end(tokenizer, name, data):
    bos, eos = PLAIN[name]
    made = sft(tokenizer(name), ROWS, **data)
    for example, prompt, row in zip(made, prompts(tokenizer(name), ROWS, **data), ROWS, strict=True):
        assert example.prompt_ids == prompt.prompt_ids
        text, completion = read(tokenizer(name), example)
        assert text.startswith(bos) and text.rstrip("\n").endswith(row["prompt"]) and eos not in text
        assert completion.strip() == row["completion"] + eos
        assert completion.count(eos) == 1


@pytest.mark.parametrize("name", PLAIN)
def test_its_pairs_and_texts(tokenizer, name):
    bos, eos = PLAIN[name]
    (pair,) = pairs(tokenizer(name), [{"prompt": "Is it so?", "chosen": "Yes", "rejected": "No"}])
    assert tokenizer(name).decode(pair.prompt_ids) == f"{bos}Is it so?"
    assert tokenizer(name).decode(pair.chosen_ids).strip() == f"Yes{eos}"
    (whole,) = sft(tokenizer(name), [{"page": "A short page."}], text="page", prompt="page")
    text = tokenizer(name).decode(whole.prompt_ids + whole.completion_ids)
    assert text == f"{bos}A short page.{eos}"
    assert labelled_texts([{"page": "A.", "kind": "x"}], config(text="page", label="kind")) == (["A."], ["x"])


def test_an_end_that_is_written_out_in_the_text_stays_within_it(tokenizer, caplog):
    (prompt,) = prompts(tokenizer("adds_eos"), [{"prompt": "What does <|im_end|> mean?"}])
    ids = prompt.prompt_ids
    assert tokenizer("adds_eos").decode(ids) == "What does <|im_end|> mean?"
    assert ids[-1] != tokenizer("adds_eos").eos_token_id


def test_a_prompt_that_was_written_to_end_in_a_stop(tokenizer):
    for name in ("plain", "adds_eos"):
        try:
            (prompt,) = prompts(tokenizer(name), [{"prompt": "Name a port.<|im_end|>"}])
        except UserError as error:
            assert "row 1" in str(error)
            continue
        assert prompt.prompt_ids[-1] not in stops_of(tokenizer(name))


def test_a_turn_that_ends_in_another_token_than_a_text(tokenizer):
    chatml = tokenizer("base")
    assert chatml.eos_token == "<|endoftext|>"
    (asked, _) = sft(chatml, ROWS)
    assert read(chatml, asked) == ("<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n", "5<|im_end|>")
    (told,) = sft(chatml, [{"messages": talk("Hi", "Hello.", "Name a port.", "Kiel.")}])
    assert read(chatml, told)[1] == "Kiel.<|im_end|>"
    (pair,) = pairs(chatml, [{"prompt": "Is it so?", "chosen": "Yes", "rejected": "No"}])
    assert chatml.decode(pair.chosen_ids) == "Yes<|im_end|>"
    assert stops_of(chatml) == {chatml.eos_token_id, chatml.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize(
    ("turns", "end"),
    [
        ("[{{ m.role }}]{{ m.content }}<think>", "<think>"),  # any token of its own may end a turn
        ("{{ m.role }}: {{ m.content }}\n", "<|im_end|>"),  # nothing ends one, so the text's end does
        ("{{ m.role }}: {{ m.content }}<|endoftext|>\n", "<|endoftext|>"),
        ("{{ m.role }}: {{ m.content }}{{ eos_token }}\n", "<|im_end|>"),
    ],
)
def test_what_ends_a_turn_is_learned_once(tokenizer, turns, end):
    template = "{% for m in messages %}" + turns + "{% endfor %}{% if add_generation_prompt %}{{ 'GO' }}{% endif %}"
    role = "[assistant]" if turns.startswith("[") else "assistant: "
    made = tokenizer(template.replace("GO", role))
    (example,) = sft(made, [{"messages": talk("Name a port.", "Kiel.")}])
    text, completion = read(made, example)
    assert completion.removeprefix(" ").replace("\n", "") == f"Kiel.{end}"
    assert (text + completion).count("Kiel.") == 1
    assert completion.endswith(end)


def test_a_stop_in_the_middle_of_an_answer(tokenizer, caplog):
    for row in (
        {"messages": talk("Name two ports.", "Kiel.<|im_end|>Emden.")},
        {"messages": talk("Name two ports.", "<|im_end|>")},
        {"messages": talk("Name two ports.", "Kiel.<|im_end|>\n<|im_start|>user\nMore?")},
    ):
        caplog.clear()
        try:
            (example,) = sft(tokenizer("chatml"), [row])
        except UserError as error:
            assert "row 1" in str(error) and "<|im_" in str(error)
            continue
        stops = stops_of(tokenizer("chatml"))
        ends = [one for one in example.completion_ids if one in stops]
        assert (len(ends) == 1 and example.completion_ids[-1] == ends[0]) or caplog.messages
        assert "<|im_end|>" in " ".join(caplog.messages)


def test_a_stop_that_ends_an_answer_already_is_learned_once(tokenizer):
    try:
        (example,) = sft(tokenizer("chatml"), [{"messages": talk("Name a port.", "Kiel.<|im_end|>")}])
    except UserError as error:
        assert "row 1" in str(error) and "<|im_end|>" in str(error)
    else:
        assert read(tokenizer("chatml"), example)[1] == "Kiel.<|im_end|>"
    (example,) = sft(tokenizer("plain"), [{"prompt": "Name a port.", "completion": "Kiel.<|im_end|>"}])
    assert read(tokenizer("plain"), example)[1] == "\nKiel.<|im_end|>"
