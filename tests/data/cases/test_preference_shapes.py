"""Preference sets that hold the whole conversation in both answers, with a prompt beside them or without one."""

import pytest
from building import names_row, pairs, refusal, talk, turn, warnings_of

from lowmem_rlhf.errors import UserError

ASKED = "<|im_start|>user\nIs lava cold?<|im_end|>\n<|im_start|>assistant\n"
BETTER, WORSE = talk("Is lava cold?", "No, it is hot."), talk("Is lava cold?", "Very.")
HH = {
    "chosen": "\n\nHuman: Is lava cold?\n\nAssistant: No, it is hot.",
    "rejected": "\n\nHuman: Is lava cold?\n\nAssistant: Very.",
}


def read(tokenizer, pair):
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is lava cold?", "chosen": BETTER, "rejected": WORSE},
        {"chosen": BETTER, "rejected": WORSE},
        {"prompt": None, "chosen": BETTER, "rejected": WORSE},
        {"prompt": [turn("user", "Is lava cold?")], "chosen": BETTER, "rejected": WORSE},
        {"prompt": "Is lava cold?", "chosen": [BETTER[-1]], "rejected": [WORSE[-1]]},
        {"prompt": "Is lava cold?", "chosen": "No, it is hot.", "rejected": "Very."},
    ],
)
def test_the_common_beginning_is_the_prompt(tokenizer, row):
    (pair,) = pairs(tokenizer("chatml"), [row])
    assert read(tokenizer("chatml"), pair) == (ASKED, "No, it is hot.<|im_end|>", "Very.<|im_end|>")


def test_a_prompt_of_several_turns_and_a_system_text(tokenizer):
    before = talk("Hi", "Hello.", "Is lava cold?", system="Be brief.")
    row = {"chosen": [*before, BETTER[-1]], "rejected": [*before, WORSE[-1]]}
    for one in (row, {**row, "prompt": "Is lava cold?"}, {**row, "prompt": before}):
        (pair,) = pairs(tokenizer("chatml"), [one])
        text, chosen, rejected = read(tokenizer("chatml"), pair)
        assert text == tokenizer("chatml").apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        assert (chosen, rejected) == ("No, it is hot.<|im_end|>", "Very.<|im_end|>")


def test_hh_texts_end_at_the_last_assistant(tokenizer):
    (pair,) = pairs(tokenizer("plain"), [HH], chat=False)
    text, chosen, rejected = read(tokenizer("plain"), pair)
    assert text.strip() == "Human: Is lava cold?\n\nAssistant:"
    assert text + chosen == HH["chosen"] + "<|im_end|>"
    assert text + rejected == HH["rejected"] + "<|im_end|>"


def test_hh_texts_of_several_turns(tokenizer):
    before = "\n\nHuman: Hi\n\nAssistant: Hello, I am an Assistant: ask.\n\nHuman: Is lava cold?\n\nAssistant:"
    row = {"chosen": before + " No, it is hot.", "rejected": before + " No, not at all."}
    (pair,) = pairs(tokenizer("plain"), [row], chat=False)
    text, chosen, rejected = read(tokenizer("plain"), pair)
    assert text.strip() == before.strip()
    assert (chosen.strip(), rejected.strip()) == ("No, it is hot.<|im_end|>", "No, not at all.<|im_end|>")


def test_hh_texts_that_part_before_their_last_answer(tokenizer):
    row = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Is lava cold?\n\nAssistant: No.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hm.\n\nHuman: What?\n\nAssistant: Nothing.",
    }
    try:
        (pair,) = pairs(tokenizer("plain"), [row], chat=False)
    except UserError as error:
        assert names_row(str(error), 1) and "Assistant:" in str(error)
        return
    text, chosen, rejected = read(tokenizer("plain"), pair)
    assert text.strip() == "Human: Hi\n\nAssistant:"
    assert "Is lava cold?" in chosen and "What?" in rejected


def test_hh_texts_with_a_chat_template_are_no_turn_of_the_user_alone(tokenizer):
    (pair,) = pairs(tokenizer("chatml"), [HH])
    text, chosen, rejected = read(tokenizer("chatml"), pair)
    assert (chosen.strip(), rejected.strip()) == ("No, it is hot.<|im_end|>", "Very.<|im_end|>")
    assert "Is lava cold?" in text and "No, it is hot" not in text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is ice cold?", "chosen": BETTER, "rejected": WORSE},  # not what the conversations begin with
        {"chosen": BETTER, "rejected": talk("Is ice cold?", "Very.")},
        {"chosen": BETTER, "rejected": BETTER},
        {"chosen": BETTER[:1], "rejected": WORSE},
        {"chosen": [*BETTER, turn("user", "Sure?")], "rejected": [*WORSE, turn("user", "Sure?")]},
        {"chosen": BETTER, "rejected": "Very."},
        {"chosen": [BETTER[-1]], "rejected": [WORSE[-1]]},  # no prompt anywhere
        {"chosen": "No, it is hot.", "rejected": "Very."},
        {"chosen": [], "rejected": WORSE},
    ],
)
def test_what_does_not_fit_together_names_its_row(tokenizer, caplog, row):
    good = {"chosen": BETTER, "rejected": WORSE}
    if not isinstance(row["chosen"], list) or len(row["chosen"]) == 1:
        good = {"prompt": "Is lava cold?", **good}
        row = {"prompt": None, **row}
    message = refusal(pairs, tokenizer("chatml"), [good, row])
    assert names_row(message, 2) and not names_row(message, 1), message
    (kept,) = pairs(tokenizer("chatml"), [good, row], bad_rows="drop")
    assert read(tokenizer("chatml"), kept)[0] == ASKED
    assert [one for one in warnings_of(caplog) if names_row(one, 2)]
