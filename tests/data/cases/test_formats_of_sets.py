"""Sets in known formats, recognised by their columns where the recipe names none, and said in one line."""

import json

import pytest
from building import talk, turn

from lowmem_rlhf.data.formats import detect_format
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import validate_recipe

SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
BETTER, WORSE = talk("Is lava cold?", "No."), talk("Is lava cold?", "Yes.")
HH = "\n\nHuman: Is lava cold?\n\nAssistant:"
ALPACA = {"template": "{instruction}\n\n{input?}", "completion": "output"}
JUDGED = {"rewards": [{"function": "length", "options": {"target": 5}}]}


def detected(algorithm, row, data=None, **sections):
    recipe = validate_recipe(
        {"algorithm": algorithm, "model": "x", "data": {"train": "rows.jsonl", **(data or {})}, **sections}
    )
    found, line = detect_format(recipe, list(row), [Row(row, 1)])
    return found.data, line


@pytest.mark.parametrize(
    ("algorithm", "row", "columns"),
    [
        ("sft", {"instruction": "Add.", "input": "2, 3", "output": "5"}, ALPACA),
        ("sft", {"instruction": "Greet.", "input": "", "output": "Hi", "text": "Below is ..."}, ALPACA),
        ("sft", {"conversations": SHARED, "id": "a1"}, {"messages": "conversations", "completion": None}),
        ("sft", {"messages": talk("Hi", "Hello."), "source": "x"}, {"messages": "messages", "completion": None}),
        ("sft", {"prompt": "Hi", "completion": "Hello."}, {"prompt": "prompt", "completion": "completion"}),
        ("sft", {"problem": "2+3", "solution": "5"}, {"prompt": "problem", "completion": "solution"}),
        ("sft", {"text": "A page."}, {"text": "text", "completion": None}),
        ("reward_model", {"chosen": BETTER, "rejected": WORSE}, {"prompt": None}),
        ("trl/dpo", {"chosen": HH + " No.", "rejected": HH + " Yes."}, {"prompt": None}),
        ("trl/dpo", {"prompt": "Is lava cold?", "chosen": "No.", "rejected": "Yes."}, {"prompt": "prompt"}),
        ("trl/orpo", {"question": "Is it?", "chosen": "No.", "rejected": "Yes."}, {"prompt": "question"}),
        ("trl/dpo", {"prompt": "Is lava cold?", "chosen": BETTER, "rejected": WORSE}, {"chosen": "chosen"}),
        (
            "trl/dpo",
            {
                "input": {"messages": talk("Hi")},
                "preferred_output": [turn("assistant", "A")],
                "non_preferred_output": [],
            },
            {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},
        ),
        ("trl/kto", {"prompt": "Is it?", "completion": "No.", "label": True}, {"prompt": "prompt", "label": "label"}),
        ("grpo", {"problem": "2+3", "answer": "5"}, {"prompt": "problem", "answer": "answer"}),
        ("grpo", {"prompt": [turn("user", "Hi")]}, {"prompt": "prompt", "answer": None}),
        ("grpo", {"messages": [turn("user", "Hi")]}, {"prompt": "messages", "messages": None}),
        ("grpo", {"conversations": SHARED[:1], "answer": "5"}, {"prompt": "conversations", "answer": "answer"}),
        ("grpo", {"messages": talk("Hi", "Hello.")}, {"prompt": "question", "messages": "messages"}),
    ],
)
def test_a_set_is_recognised(algorithm, row, columns):
    # what the recipe says of its kind of rows is given for KTO, whose pairs are the default
    named = {"completion": "completion", "label": "label"} if algorithm == "trl/kto" else {}
    data, line = detected(algorithm, row, named, **(JUDGED if algorithm == "grpo" else {}))
    assert {key: getattr(data, key) for key in columns} == columns
    usual = data.prompt == "question" and data.template is None and data.messages is None and data.text is None
    assert usual or (line and "\n" not in line)


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"question": "2+3", "answer": "5", "messages": talk("Hi", "Hello.")}, {}),
        ({"a": "2+3", "b": "5", "messages": talk("Hi", "Hello.")}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "Add.", "input": "2", "output": "5", "b": "6"}, {"prompt": "instruction", "completion": "b"}),
        ({"conversations": SHARED, "messages": talk("Hi", "Hello.")}, {"messages": "conversations"}),
        ({"text": "A page.", "page": "Another."}, {"text": "page"}),
    ],
)
def test_what_the_recipe_names_is_left_alone(row, data):
    found, line = detected("sft", row, data)
    assert line == ""
    assert all(getattr(found, key) == column for key, column in data.items())


@pytest.mark.parametrize("row", [{"q": "2+3", "a": "5"}, {"messages": "no list"}, {"chosen": "a", "rejected": "b"}])
def test_what_is_no_known_format_is_left_alone(row):
    try:
        data, line = detected("sft", row)
    except UserError as error:
        assert "column" in str(error)
        return
    assert (line, data.prompt, data.messages, data.template) == ("", "question", None, None)


JOINED = ALPACA["template"]
BARE = HH.lstrip()


@pytest.mark.parametrize(
    ("algorithm", "row", "columns"),
    [
        ("trl/dpo", {"instruction": "Add.", "input": "2, 3", "chosen": "5", "rejected": "6"}, {"template": JOINED}),
        ("reward_model", {"instruction": "Add.", "input": "", "chosen": "5", "rejected": "6"}, {"template": JOINED}),
        ("trl/dpo", {"question": "2+3", "input": "x", "chosen": "5", "rejected": "6"}, {"template": None}),
        ("trl/kto", {"prompt": "2+3", "completion": "5", "label": True}, {"label": "label", "chosen": None}),
        ("trl/kto", {"question": "2+3", "completion": "5", "label": True}, {"prompt": "question", "label": "label"}),
        ("trl/kto", {"prompt": "2+3", "chosen": "5", "rejected": "6", "label": "x"}, {"label": None}),
        ("trl/dpo", {"chosen": BARE + " No.", "rejected": BARE + " Yes."}, {"prompt": None}),
        ("sft", {"messages": json.dumps(BETTER)}, {"messages": "messages"}),
        ("sft", {"messages": str(BETTER)}, {"messages": None}),
    ],
)
def test_columns_that_go_together(algorithm, row, columns):
    data, _ = detected(algorithm, row)
    assert {key: getattr(data, key) for key in columns} == columns


@pytest.mark.parametrize(
    "row", [{"instruction": "Add.", "input": "2", "output": "5"}, {"messages": BETTER}, {"text": "a"}]
)
def test_a_mistyped_column_is_not_replaced(row):
    data, line = detected("sft", row, {"completion": "outptu"})
    assert (data.completion, line) == ("outptu", "")


def test_of_missing_columns_the_one_that_the_recipe_names_is_said(command):
    """The prompt's default is missing too, and would have been found by the format."""
    rows = [{"instruction": "Add.", "input": "2, 3", "output": "5"}]
    done = command("data", "chatml", rows, data={"completion": "outptu"})
    assert done.code == 2 and "data.completion: rows.jsonl has no column 'outptu'; did you mean 'output'?" in done.err
