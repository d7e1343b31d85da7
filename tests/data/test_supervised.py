import importlib.util
import logging
from pathlib import Path

import pytest

from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.data.prompts import build_examples
from lowmem_rlhf.data.readers import read_file
from lowmem_rlhf.data.sources import load_rows
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.data.supervised import Supervised, build_pairs, build_supervised, labelled_texts
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import DataConfig

ROWS = [{"question": "2 + 3", "answer": "It is 5."}, {"question": "4 + 5", "answer": "It is 9."}]
USER = {"role": "user", "content": "2 + 3"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "It is 5."}
CONVERSATION = [{"talk": [USER, ASSISTANT, {"role": "user", "content": "Sure?"}, {**ASSISTANT, "content": "Yes."}]}]
PAIRS = [{"question": "2 + 3", "good": "5", "bad": "six", "by": 2}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)


def config(**data):
    return DataConfig(**{"train": "rows.jsonl", "answer": None, **data})


def sft(tokenizer, rows=ROWS, stops=None, max_length=1024, only=True, **data):
    data = data if {"messages", "text"}.intersection(data) else {"completion": "answer", **data}
    settings = SFTSettings(max_length=max_length, completion_only_loss=only)
    stop_ids = frozenset([tokenizer.eos_token_id]) if stops is None else frozenset(stops)
    return build_supervised(rows, config(**data), settings, tokenizer, stop_ids)


def pairs(tokenizer, rows=PAIRS, max_length=1024, **data):
    data = {"chosen": "good", "rejected": "bad", **data}
    return build_pairs(rows, config(**data), max_length, tokenizer, frozenset([tokenizer.eos_token_id]))


def texts(tokenizer, example):
    return tokenizer.decode(example.prompt_ids), tokenizer.decode(example.completion_ids)


def whole(tokenizer, example):
    return tokenizer.decode(example.prompt_ids + example.completion_ids)


def refused(message, make, *args, **settings):
    with pytest.raises(UserError, match=message) as caught:
        make(*args, **settings)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def chatml_tokenizer(make_tokenizer):
    """Return a tokenizer whose turns end with a special token that is not its end of sequence, and a newline."""
    made = make_tokenizer(CHATML)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


@pytest.fixture(scope="module")
def llama2_tokenizer():
    """Return a tokenizer that puts a space before every text, and writes a newline as a byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "=", "▁=", "It", "is"]
    vocab = {symbol: index for index, symbol in enumerate([*symbols, *"Itis0123456789.+?ab"])}
    model = models.BPE(vocab=vocab, merges=[("▁", "="), ("I", "t"), ("i", "s")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    from transformers import AutoTokenizer

    package, file = smollm2.removeprefix("package:").split("/")
    return AutoTokenizer.from_pretrained(Path(str(importlib.util.find_spec(package).origin)).parent, gguf_file=file)


def test_plain_completion_begins_with_a_newline_and_ends_with_one_eos(plain_tokenizer):
    first, second = sft(plain_tokenizer)
    assert texts(plain_tokenizer, first) == ("<s>2 + 3", "\nIt is 5.</s>")
    assert texts(plain_tokenizer, second) == ("<s>4 + 5", "\nIt is 9.</s>")
    assert first.completion_ids.count(plain_tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [("{question} =\n", "5", "5"), ("{question} = ", "5", "5"), ("{question} =", " 5", " 5"), ("{question}", 5, "\n5")],
)
def test_no_newline_where_there_is_whitespace(plain_tokenizer, template, answer, expected):
    rows = [{"question": "2 + 3", "answer": answer}]
    assert texts(plain_tokenizer, sft(plain_tokenizer, rows, template=template)[0])[1] == f"{expected}</s>"


def test_eos_that_the_text_has_is_not_added_again(plain_tokenizer):
    rows = [{"question": "2 + 3", "answer": "5</s>"}]
    assert texts(plain_tokenizer, sft(plain_tokenizer, rows)[0])[1] == "\n5</s>"
    assert texts(plain_tokenizer, sft(plain_tokenizer, [{"page": "ab</s>"}], text="page")[0]) == ("<s>", "ab</s>")


def test_without_an_eos_the_stop_id_of_the_model_ends(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert sft(tokenizer, stops=[7])[0].completion_ids[-1] == 7
    refused("names no end-of-sequence token", sft, tokenizer, stops=[])


def test_chat_completion_is_the_assistants_turn(chat_tokenizer):
    for answer in ("It is 5.", [{**ASSISTANT, "name": None}]):
        (example,) = sft(chat_tokenizer, [{"question": "2 + 3", "answer": answer}], system="Be brief.")
        assert texts(chat_tokenizer, example) == ("<s>[system]Be brief.</s>[user]2 + 3</s>[assistant]", "It is 5.</s>")
        rendered = chat_tokenizer.apply_chat_template([SYSTEM, USER, ASSISTANT], tokenize=False)
        assert whole(chat_tokenizer, example) == rendered


def test_turn_ends_at_the_first_stop_token(chatml_tokenizer, make_tokenizer):
    turn_end, eos = chatml_tokenizer.convert_tokens_to_ids("<|im_end|>"), chatml_tokenizer.eos_token_id
    stops = [turn_end, eos]
    assert texts(chatml_tokenizer, sft(chatml_tokenizer, stops=stops)[0])[1] == "It is 5.<|im_end|>"
    # whatever the tokenizer calls its end: what the template ends a turn with is a stop
    assert texts(chatml_tokenizer, sft(chatml_tokenizer)[0])[1] == "It is 5.<|im_end|>"
    # a template that ends the conversation too, as Phi-3's
    phi = make_tokenizer(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    phi.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert texts(phi, sft(phi, stops=stops)[0])[1] == "It is 5.<|im_end|>"
    assert texts(phi, sft(phi)[0])[1] == "It is 5.<|im_end|>"


def test_template_that_ends_no_turn(no_system_tokenizer):
    assert texts(no_system_tokenizer, sft(no_system_tokenizer)[0]) == ("2 + 3", "It is 5.</s>")
    rows = [{"question": "2 + 3", "answer": "5\n"}]
    assert texts(no_system_tokenizer, sft(no_system_tokenizer, rows)[0])[1] == "5\n</s>"


def test_a_begun_answer_is_completed(chat_tokenizer):
    rows = [{"question": [USER, {**ASSISTANT, "content": "It"}], "answer": " is 5."}]
    assert texts(chat_tokenizer, sft(chat_tokenizer, rows)[0]) == ("<s>[user]2 + 3</s>[assistant]It", " is 5.</s>")


def test_conversation_learns_its_last_answer(chat_tokenizer):
    (example,) = sft(chat_tokenizer, CONVERSATION, messages="talk", system="Be brief.")
    before = "<s>[system]Be brief.</s>[user]2 + 3</s>[assistant]It is 5.</s>[user]Sure?</s>[assistant]"
    assert texts(chat_tokenizer, example) == (before, "Yes.</s>")
    (prompt,) = build_examples(CONVERSATION, config(messages="talk"), chat_tokenizer)
    assert prompt.prompt == CONVERSATION[0]["talk"][:-1]
    assert prompt.columns == {}
    assert prompt.prompt_ids == sft(chat_tokenizer, CONVERSATION, messages="talk")[0].prompt_ids


def test_text_is_learned_but_its_first_token(plain_tokenizer, llama2_tokenizer):
    (example,) = sft(plain_tokenizer, [{"page": "ab\n"}], text="page")
    assert texts(plain_tokenizer, example) == ("<s>", "ab\n</s>")
    (example,) = sft(llama2_tokenizer, [{"page": "ab"}], text="page")  # no BOS here
    assert llama2_tokenizer.convert_ids_to_tokens(example.prompt_ids) == ["▁"]
    assert llama2_tokenizer.convert_ids_to_tokens(example.completion_ids) == ["a", "b", "</s>"]


@pytest.mark.parametrize(
    ("name", "rows", "data"),
    [
        ("plain_tokenizer", ROWS, {}),
        ("chat_tokenizer", ROWS, {}),
        ("chat_tokenizer", CONVERSATION, {"messages": "talk"}),
        ("plain_tokenizer", [{"page": "ab"}], {"text": "page"}),
    ],
)
def test_learning_the_prompt_too(request, name, rows, data):
    tokenizer = request.getfixturevalue(name)
    for one, all_of_it in zip(sft(tokenizer, rows, **data), sft(tokenizer, rows, only=False, **data), strict=True):
        assert all_of_it.prompt_ids == one.prompt_ids[:1]
        assert all_of_it.prompt_ids + all_of_it.completion_ids == one.prompt_ids + one.completion_ids


@pytest.mark.parametrize("name", ["plain_tokenizer", "chat_tokenizer", "llama2_tokenizer", "smollm2_tokenizer"])
@pytest.mark.parametrize("data", [{}, {"template": "What is {question}?\n", "system": "Be brief."}, {"chat": False}])
def test_prompts_are_those_of_rollouts(request, name, data):
    tokenizer = request.getfixturevalue(name)
    examples = sft(tokenizer, **data)
    assert [one.prompt_ids for one in examples] == [
        one.prompt_ids for one in build_examples(ROWS, config(**data), tokenizer)
    ]
    assert [one.completion_ids.count(tokenizer.eos_token_id) for one in examples] == [1, 1]


def test_no_space_is_put_before_a_completion(llama2_tokenizer):
    (example, _) = sft(llama2_tokenizer, template="{question} ?")
    assert whole(llama2_tokenizer, example) == "2 + 3 ?\nIt is 5.</s>"
    tokens = llama2_tokenizer.convert_ids_to_tokens(example.completion_ids)
    assert tokens == ["<0x0A>", "It", "▁", "is", "▁", "5", ".", "</s>"]
    (example, _) = sft(llama2_tokenizer, template="{question}\n")
    assert llama2_tokenizer.convert_ids_to_tokens(example.completion_ids)[0] == "It"


def test_smollm2_conversation_is_as_rendered(smollm2_tokenizer):
    tokenizer, eos = smollm2_tokenizer, smollm2_tokenizer.eos_token_id
    asked = {"role": "user", "content": "What is 2 + 3?"}
    (example, _) = sft(tokenizer, template="What is {question}?")
    ids = tokenizer.apply_chat_template([asked, ASSISTANT], return_dict=False)
    assert [*example.prompt_ids, *example.completion_ids] == ids[: len(ids) - ids[::-1].index(eos)]
    assert whole(tokenizer, example) == tokenizer.apply_chat_template([asked, ASSISTANT], tokenize=False).rstrip()
    (example,) = sft(tokenizer, CONVERSATION, messages="talk")
    assert texts(tokenizer, example)[1] == "Yes.<|im_end|>"
    rendered = tokenizer.apply_chat_template(CONVERSATION[0]["talk"], tokenize=False)
    assert whole(tokenizer, example) == rendered.rstrip()


def test_smollm2_plain_text(smollm2_tokenizer):
    (example, _) = sft(smollm2_tokenizer, chat=False)
    assert whole(smollm2_tokenizer, example) == "2 + 3\nIt is 5.<|im_end|>"
    (example,) = sft(smollm2_tokenizer, [{"page": "To be, or not to be"}], text="page")
    assert texts(smollm2_tokenizer, example) == ("To", " be, or not to be<|im_end|>")


def test_pairs(plain_tokenizer, chat_tokenizer):
    (pair,) = pairs(plain_tokenizer, margin="by")
    assert plain_tokenizer.decode(pair.prompt_ids) == "<s>2 + 3"
    assert plain_tokenizer.decode(pair.chosen_ids) == "\n5</s>"
    assert plain_tokenizer.decode(pair.rejected_ids) == "\nsix</s>"
    assert pair.margin == 2.0 and type(pair.margin) is float
    rows = [{"question": [USER], "good": [ASSISTANT], "bad": [{**ASSISTANT, "content": "six"}]}]
    (pair,) = pairs(chat_tokenizer, rows)
    assert pair.margin == 0.0
    assert chat_tokenizer.decode(pair.prompt_ids + pair.rejected_ids) == "<s>[user]2 + 3</s>[assistant]six</s>"
    assert chat_tokenizer.decode(pair.chosen_ids) == "It is 5.</s>"


@pytest.mark.parametrize("chat", [True, False])
def test_real_preferences(smollm2_tokenizer, shared, chat):
    path = shared / "data" / "gsm8k" / "preferences.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    tokenizer = smollm2_tokenizer
    rows = list(read_file(str(path), "data.train"))[:200]
    data = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "chat": chat}
    made = pairs(tokenizer, rows, **data)
    prompts = build_examples(rows, config(**data), tokenizer)
    assert [pair.prompt_ids for pair in made] == [prompt.prompt_ids for prompt in prompts]
    start = "" if chat else "\n"
    for row, pair in zip(rows, made, strict=True):
        for ids, name in ((pair.chosen_ids, "chosen"), (pair.rejected_ids, "rejected")):
            assert tokenizer.decode(ids) == f"{start}{row[name]}<|im_end|>"


def test_labelled_texts():
    rows = [{"page": "To be", "kind": "verse"}, {"page": "or not", "kind": 3}]
    assert labelled_texts(rows, config(text="page", label="kind")) == (["To be", "or not"], ["verse", "3"])


def test_long_examples(plain_tokenizer, caplog):
    rows = [*ROWS, {"question": "1 + 1 + 1", "answer": "It is 3."}]  # 16 and 20 tokens
    message = (
        r"row 3: its example has 20 tokens, sft.max_length is 16 \(1 of 3 examples are above it, the longest has 20\); "
        "raise sft.max_length to 20, or set data.long_prompts=drop"
    )
    refused(message, sft, plain_tokenizer, rows, max_length=16)
    with caplog.at_level(logging.WARNING):
        kept = sft(plain_tokenizer, rows, max_length=16, long_prompts="drop")
    assert kept == sft(plain_tokenizer)
    assert "1 of 3 examples have more than 16 tokens and are left out" in caplog.text
    refused("all 3 examples are above sft.max_length", sft, plain_tokenizer, rows, max_length=3, long_prompts="drop")
    # BOS and 5 of the prompt; newline, 3 and EOS of the longer answer
    assert len(pairs(plain_tokenizer, max_length=11)) == 1
    refused("row 1: its pair has 11 tokens, reward_model.max_length is 10", pairs, plain_tokenizer, max_length=10)


@pytest.mark.parametrize("value", [None, "", " \n", []])
def test_empty_answers(plain_tokenizer, chat_tokenizer, value):
    rows = [ROWS[0], {"question": "4 + 5", "answer": value}]
    message = "row 2: column 'answer' is"
    refused("row 2: column 'answer' must hold a text" if value == [] else message, sft, plain_tokenizer, rows)
    refused("row 2: column 'answer' has no messages" if value == [] else message, sft, chat_tokenizer, rows)
    refused("row 1: column 'bad' (is|must)", pairs, plain_tokenizer, [{**PAIRS[0], "bad": value}])


def test_refused_answers(plain_tokenizer, chat_tokenizer, make_tokenizer):
    empty = [{"role": "assistant", "content": " "}]
    refused("row 1: column 'answer' is empty", sft, chat_tokenizer, [{**ROWS[0], "answer": empty}])
    for value in ([USER], [USER, ASSISTANT]):
        refused(
            "row 1: column 'answer' must hold a text or a list of one assistant message; got messages of user.* belong",
            sft,
            chat_tokenizer,
            [{**ROWS[0], "answer": value}],
        )
    refused(
        "row 1: column 'answer' must hold a text; got dict", sft, chat_tokenizer, [{**ROWS[0], "answer": ASSISTANT}]
    )
    refused("row 1: .*<think>, which the answer .* does not close.*data.chat=false", sft, make_tokenizer(THINKING))
    refused("row 1: column 'question' is empty", sft, plain_tokenizer, [{"question": "", "answer": "5"}])
    refused("row 1: column 'page' is empty", sft, plain_tokenizer, [{"page": " "}], text="page")
    refused("row 1: column 'page' must hold a text; got list", sft, plain_tokenizer, [{"page": [USER]}], text="page")
    silent = make_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    refused("row 1: .* leaves out or rewrites message 1 .user.: '2 . 3'", sft, silent)


def test_refused_conversations(plain_tokenizer, chat_tokenizer):
    def talk(*messages):
        return [{"talk": list(messages)}]

    def refuse(message, tokenizer, rows, **data):
        refused(message, sft, tokenizer, rows, messages="talk", **data)

    refuse("data.messages: .* the model's tokenizer has none", plain_tokenizer, CONVERSATION)
    refuse("data.messages: .* data.chat is false; leave it out", chat_tokenizer, CONVERSATION, chat=False)
    refuse("row 1: the last message .* got a message of user", chat_tokenizer, talk(USER, ASSISTANT, USER))
    refuse("row 1: .* ends in two messages of the assistant", chat_tokenizer, talk(USER, ASSISTANT, ASSISTANT))
    refuse("row 1: .* nothing but the assistant's answer", chat_tokenizer, talk(ASSISTANT))
    refuse("row 1: .* must hold a list of chat messages; got str", chat_tokenizer, [{"talk": "2 + 3"}])
    refuse("row 1: .* not one of chat messages", chat_tokenizer, talk("2 + 3"))
    refuse("row 1: the last answer of column 'talk' is empty", chat_tokenizer, talk(USER, {**ASSISTANT, "content": ""}))
    with pytest.raises(UserError, match=r"data\.text: whole texts have no prompt"):
        build_examples([{"page": "ab"}], config(text="page"), plain_tokenizer)


def test_refused_pairs(plain_tokenizer, chat_tokenizer):
    same = [PAIRS[0], {**PAIRS[0], "bad": "5"}]
    refused("row 2: columns 'good' and 'bad' hold the same answer", pairs, plain_tokenizer, same)
    refused("row 2: columns 'good' and 'bad' hold the same answer", pairs, chat_tokenizer, same)
    for value in (None, "two", True, float("nan"), float("inf")):
        rows = [{**PAIRS[0], "by": value}]
        refused("row 1: column 'by' must hold a finite number; got", pairs, plain_tokenizer, rows, margin="by")


def test_refused_labels():
    data = config(text="page", label="kind")
    for value in (None, " ", 1.5, ["verse"]):
        refused("row 1: column 'kind' must hold a class", labelled_texts, [{"page": "To be", "kind": value}], data)
    refused("row 1: column 'page' is empty", labelled_texts, [{"page": " ", "kind": 1}], data)
    refused("row 1: it has no column 'kind' .data.label.", labelled_texts, [{"page": "To be"}], data)


@pytest.mark.parametrize("key", ["prompt", "completion", "messages", "text", "chosen", "rejected", "margin", "label"])
def test_a_missing_column_is_named(tmp_path, key):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "2 + 3", "kinds": 1}\n' * 4)
    for name, hint in (("kind", "; did you mean 'kinds'?"), ("xyz", "")):
        with pytest.raises(UserError) as caught:
            load_rows(config(train=str(path), eval_size=0, **{key: name}), "train")
        assert str(caught.value) == f"data.{key}: {path} has no column {name!r}{hint} (its columns: question, kinds)"


def test_columns_of_conversations_and_texts_need_no_prompt(tmp_path, chat_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"talk": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "n": 1}\n' * 4
    )
    rows = load_rows(config(train=str(path), eval_size=0, messages="talk"), "train")
    assert texts(chat_tokenizer, sft(chat_tokenizer, rows, messages="talk")[3]) == (
        "<s>[user]hi</s>[assistant]",
        "ho</s>",
    )
    path.write_text("".join(f'{{"page": "page {n}"}}\n' for n in range(4)))
    train, held_out = (
        load_rows(config(train=str(path), eval_size=2, text="page"), split) for split in ("train", "eval")
    )
    assert len(train) == len(held_out) == 2 and all(row not in held_out for row in train)


def test_stream_of_other_examples():
    examples = [Supervised([n], [n]) for n in range(4)]
    stream: PromptStream[Supervised] = PromptStream(examples, 2, seed=0)
    seen = [*stream.batch(0), *stream.batch(1)]
    assert sorted(one.prompt_ids[0] for one in seen) == [0, 1, 2, 3]
