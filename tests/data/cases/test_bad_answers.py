"""Pairs that teach nothing, answers and cells that are missing, labels that are none."""

import pytest
from building import config, names_row, pairs, prompts, refusal, sft, stops_of, turn, warnings_of

from lowmem_rlhf.recipe.loading import validate_recipe

GOOD = {"prompt": "Is snow white?", "chosen": "Yes.", "rejected": "No."}
BAD = {
    "equal": {"chosen": "Yes.", "rejected": "Yes."},
    "empty": {"chosen": "Yes.", "rejected": ""},
    "empty one": {"chosen": "", "rejected": "No."},
    "blank": {"chosen": " \n", "rejected": "No."},
    "null": {"chosen": None, "rejected": "No."},
    "nan": {"chosen": float("nan"), "rejected": "No."},
    "no prompt": {"prompt": ""},
    "null prompt": {"prompt": None},
    "equal messages": {"chosen": [turn("assistant", "Yes.")], "rejected": [turn("assistant", "Yes.")]},
    "a user's answer": {"chosen": [turn("user", "Yes.")], "rejected": [turn("assistant", "No.")]},
}


@pytest.mark.parametrize("kind", BAD)
def test_each_pair_that_teaches_nothing(tokenizer, caplog, kind):
    rows = [GOOD, {**GOOD, **BAD[kind]}, {**GOOD, "prompt": "Is coal white?", "chosen": "No.", "rejected": "Yes."}]
    message = refusal(pairs, tokenizer("chatml"), rows)
    assert names_row(message, 2) and "bad_rows" in message
    kept = pairs(tokenizer("chatml"), rows, bad_rows="drop")
    assert [tokenizer("chatml").decode(one.chosen_ids) for one in kept] == ["Yes.<|im_end|>", "No.<|im_end|>"]
    assert [one for one in warnings_of(caplog) if names_row(one, 2)]
    assert names_row(refusal(pairs, tokenizer("chatml"), rows[1:2], bad_rows="drop"), 1)


def test_all_reasons_of_pairs_at_once(tokenizer, caplog):
    rows = [{**GOOD, **change} for change in BAD.values()]
    message = refusal(pairs, tokenizer("chatml"), [GOOD, *rows])
    assert names_row(message, 2) and names_row(message, 3) and names_row(message, 11)
    (kept,) = pairs(tokenizer("chatml"), [*rows, GOOD], bad_rows="drop")
    assert tokenizer("chatml").decode(kept.rejected_ids) == "No.<|im_end|>"


def test_a_missing_cell_of_sft(tokenizer, caplog):
    rows = [{"prompt": "Who?", "completion": "I."}, {"prompt": "Who?", "completion": None}, {"prompt": "Who?"}]
    message = refusal(sft, tokenizer("plain"), rows)
    assert names_row(message, 2)
    assert len(sft(tokenizer("plain"), rows, bad_rows="drop")) == 1
    assert [one for one in warnings_of(caplog) if names_row(one, 2)]


WHOLE = {"prompt": "a", "completion": "b"}
HALF = "a half \ud83d"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HALF, "completion": "b"},
        {"prompt": "a", "completion": HALF},
        {"prompt": [turn("user", HALF)], "completion": "b"},
        {"prompt": "a", "completion": [turn("assistant", HALF)]},
        {"messages": [turn("user", "a"), turn("assistant", HALF)]},
        {"messages": [turn("user", HALF), turn("assistant", "b")]},
        {"messages": [turn("user", "a"), turn("assistant", HALF), turn("user", "a"), turn("assistant", "b")]},
    ],
)
def test_half_a_character(tokenizer, caplog, row):
    good = {"messages": [turn("user", "a"), turn("assistant", "b")]} if "messages" in row else {**row, **WHOLE}
    for learn in ("last", "all"):
        assert names_row(refusal(sft, tokenizer("chatml"), [good, row], learn=learn), 2)
        assert len(sft(tokenizer("chatml"), [good, row], learn=learn, bad_rows="drop")) == 1
    assert [one for one in warnings_of(caplog) if names_row(one, 2)]


def test_a_prompt_of_rollouts_that_is_empty(tokenizer, caplog):
    rows = [{"prompt": ""}, {"prompt": "Who?"}, {"prompt": []}, {"prompt": "  "}]
    message = refusal(prompts, tokenizer("chatml"), rows)
    assert names_row(message, 1)
    (kept,) = prompts(tokenizer("chatml"), rows, bad_rows="drop")
    assert kept.prompt == [turn("user", "Who?")]
    assert [one for one in warnings_of(caplog) if names_row(one, 1)]


def test_the_columns_of_rows_that_are_kept_stay_with_them(tokenizer):
    rows = [{"prompt": "", "answer": "1"}, {"prompt": "Two?", "answer": "2"}, {"prompt": "Three?", "answer": "3"}]
    kept = prompts(tokenizer("chatml"), rows, answer="answer", bad_rows="drop")
    assert [(one.prompt[0]["content"], one.columns["answer"]) for one in kept] == [("Two?", "2"), ("Three?", "3")]


def labelled(tokenizer, labels, **data):
    from lowmem_rlhf.data.labelled import read_answers

    recipe = validate_recipe(
        {
            "algorithm": "trl/kto",
            "model": "x",
            "data": {"train": "rows.jsonl", "prompt": "prompt", "completion": "completion", "label": "label", **data},
        }
    )
    rows = [{"prompt": f"Is {n} even?", "completion": f"It is {n}.", "label": one} for n, one in enumerate(labels)]
    return read_answers(rows, recipe, tokenizer, stops_of(tokenizer))


@pytest.mark.parametrize(
    ("yes", "no"), [(True, False), (1, 0), (1.0, 0.0), ("true", "false"), ("True", "False"), ("1", "0")]
)
def test_labels_in_the_forms_that_files_have(tokenizer, yes, no):
    assert [one.good for one in labelled(tokenizer("chatml"), [yes, no, no, yes])] == [True, False, False, True]


@pytest.mark.parametrize("label", ["maybe", 2, -1, 0.5, None, "", [True], {}])
def test_what_is_no_label(tokenizer, caplog, label):
    message = refusal(labelled, tokenizer("chatml"), [True, label, False])
    assert names_row(message, 2) and "label" in message
    kept = labelled(tokenizer("chatml"), [True, label, False], bad_rows="drop")
    assert [one.good for one in kept] == [True, False]
    assert [tokenizer("chatml").decode(one.completion_ids) for one in kept] == [
        "It is 0.<|im_end|>",
        "It is 2.<|im_end|>",
    ]
    assert [one for one in warnings_of(caplog) if names_row(one, 2)]


def test_a_margin_that_is_no_number(tokenizer, caplog):
    rows = [{**GOOD, "by": 1.5}, {**GOOD, "by": "much"}, {**GOOD, "by": float("nan")}]
    assert names_row(refusal(pairs, tokenizer("chatml"), rows, margin="by"), 2)
    (kept,) = pairs(tokenizer("chatml"), rows, margin="by", bad_rows="drop")
    assert kept.margin == 1.5
    assert config().bad_rows == "error"
