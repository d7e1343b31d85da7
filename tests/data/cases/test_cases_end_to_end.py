"""Whole commands on files: runs of one step, and the look at the data before them."""

import json

import pytest
from building import talk, turn

TALK = talk("Hi", "Hello.", "Name a river.", "The Elbe.", "And a port?", "Kiel.")
ALPACA = [
    {"instruction": "Name a metal.", "input": "", "output": "Iron."},
    {"instruction": "Say it in Italian.", "input": "bread", "output": "pane"},
]
CONVERSATIONS = [{"messages": talk("Hi", "Hello.")}, {"messages": talk("Hi", "Hello.", "Bye")}, {"messages": []}]
PREFERENCES = [
    {"chosen": talk("Is lava cold?", "No."), "rejected": talk("Is lava cold?", "Yes.")},
    {"chosen": talk("Is ice cold?", "Yes."), "rejected": talk("Is ice cold?", "Yes.")},
    {"chosen": talk("Is it so?", "Yes."), "rejected": talk("Is it so?", "No.")},
]
NESTED = [
    {"prompt": [turn("human", f"What is {n}+1?")], "reward_model": {"style": "rule", "ground_truth": str(n + 1)}}
    for n in range(1, 3)
]
RUNS = {
    "alpaca_empty_input": (
        "chatml", "sft", ALPACA, {"data": {"template": "{instruction}\n\n{input?}", "completion": "output"}}, [],
    ),
    "one_bad_conversation": (
        "chatml", "sft", [*CONVERSATIONS, {"messages": TALK}],
        {"data": {"messages": "messages", "bad_rows": "drop"}, "sft": {"learn": "all"}}, ["row 2", "row 3"],
    ),
    "prefs_hold_conversations": (
        "chatml", "trl/dpo", PREFERENCES, {"data": {"prompt": "prompt", "bad_rows": "drop"}}, ["row 2"],
    ),
    "nested_columns": (
        "base", "grpo", NESTED,
        {
            "data": {"prompt": "prompt", "answer": "reward_model.ground_truth"},
            "rewards": ["arithmetic_answer", "judge.py:by_turns"],
        },
        ["human"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_run_of_one_step(command, case, caplog):
    name, algorithm, rows, sections, says = RUNS[case]
    done = command("train", name, rows, algorithm=algorithm, **sections)
    assert done.code == 0, done
    assert (done.run / "adapter" / "adapter_model.safetensors").is_file()
    said = done.out + done.err + caplog.text
    assert all(part in said for part in says), said


def look(command, name, rows, **settings):
    done = command("data", name, rows, "--json", **settings)
    assert done.code == 0, done
    return json.loads(done.out)


def test_the_look_says_what_is_left_out(command):
    seen = look(command, "chatml", CONVERSATIONS, data={"messages": "messages", "bad_rows": "drop"})["train"]
    assert sorted((one["row"], one["count"]) for one in seen["left_out"]) == [(2, 1), (3, 1)]
    assert all(one["reason"] for one in seen["left_out"])


def test_the_look_says_which_answers_are_learned(command):
    seen = look(command, "chatml", [{"messages": TALK}] * 2, data={"messages": "messages"})["train"]
    assert seen["left_out"] == []
    assert [one for one in seen["said"] if "last" in one and "3" in one]


def test_the_look_says_what_roles_became(command):
    rows = [{"question": [turn("human", "Hi"), turn("gpt", "Hello."), turn("human", "A port?")], "answer": "Kiel."}] * 2
    seen = look(command, "chatml", rows, data={"prompt": "question", "completion": "answer"})
    assert [one for one in seen["train"]["said"] if "human" in one]


def test_the_look_at_a_thought_that_the_template_drops(command):
    answer = "<think>\nA port.\n</think>\n\nKiel."
    done = command(
        "data", "forgets", [{"messages": talk("A port?", answer)}] * 2, "--json", data={"messages": "messages"}
    )
    if done.code == 2:
        assert "row 1" in done.err and "template" in done.err
    else:
        assert [one for one in json.loads(done.out)["train"]["said"] if "template" in one]


@pytest.mark.parametrize("verb", [["data"], ["data", "--json"], ["plan"], ["train", "--dry-run"], ["train"]])
@pytest.mark.parametrize(
    ("rows", "data", "part"),
    [
        (CONVERSATIONS, {"messages": "messages"}, "row 2"),
        (ALPACA, {"template": "{instruction} {imput}", "completion": "output"}, "input"),
        (ALPACA, {"train": "row.jsonl"}, "rows.jsonl"),
    ],
)
def test_what_a_run_would_refuse_is_refused_by_all(command, verb, rows, data, part):
    done = command(verb[0], "chatml", rows, *verb[1:], data=data)
    assert done.code == 2, done
    assert part in done.err and done.err.startswith("error: ")
    assert not done.run.exists()
