"""What the look says is what training and evaluation do: the same rows, the same refusals, the file by its name."""

import json
from pathlib import Path

import pytest
from building import talk

PAIR = {"question": "Is lava cold?", "chosen": "No.", "rejected": "Yes."}
LABELLED = {"prompt": "Is lava cold?", "completion": "No.", "label": True}


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_tokens_of_a_step_are_those_of_rows_that_are_kept(command):
    rows = [{"question": "Hi", "answer": "Hello."}, {"question": "Hi", "answer": "word " * 500}]
    alone = json.loads(command("data", "chatml", rows[:1], "--json").out)["step"]
    assert "rows.jsonl, 1 row, 1 example\n" in command("data", "chatml", rows[:1]).out
    both = json.loads(command("data", "chatml", rows, "--json", "data.bad_rows=drop", "sft.max_length=64").out)["step"]
    assert both["tokens"] == alone["tokens"]


@pytest.mark.parametrize("verb", ["data", "plan", "train"])
def test_answers_of_one_kind(command, verb):
    done = command(verb, "chatml", [LABELLED, LABELLED], algorithm="trl/kto")
    assert done.code == 2
    assert "all 2 answers are good ones" in done.err
    assert not done.run.exists()


@pytest.mark.parametrize("labels", [["x", "x"], ["x", "y", "z"]])
def test_classes_that_cannot_be_learned(command, labels):
    *rows, held = [{"text": f"Text {label}.", "label": label} for label in labels]
    write("held.jsonl", [held])
    data = {"text": "text", "label": "label", "eval": "held.jsonl", "eval_size": 1}
    done = command("data", "chatml", rows, algorithm="classifier", data=data)
    assert done.code == 2
    assert "label" in done.err


@pytest.mark.parametrize("algorithm", ["sft", "trl/dpo"])
def test_eval_names_the_file_of_a_row(command, lowmem_rlhf, algorithm, caplog):
    rows = [{**PAIR, "answer": "No.", "question": f"Is lava {word}?"} for word in ("cold", "hot", "wet")]
    write("held.jsonl", [{**rows[0], "answer": "", "chosen": ""}, rows[1]])
    data = {"eval": "held.jsonl", "eval_size": 2, "bad_rows": "drop"}
    assert command("train", "chatml", rows, algorithm=algorithm, data=data).code == 0
    caplog.clear()
    done = lowmem_rlhf("eval", "run", "--json")
    assert done.code == 0
    json.loads(done.out)
    assert "row 1 of held.jsonl" in caplog.text


def test_columns_are_listed_in_their_order(command):
    rows = [{"prompt": talk("Hi"), "b": 1, "a": 2, "d": 3, "c": 4}]
    done = command("data", "chatml", rows, algorithm="grpo", rewards=[{"function": "gsm8k_answer"}])
    assert done.code == 2
    assert "its columns: prompt, b, a, d, c" in done.err


@pytest.mark.parametrize("verb", ["data", "train"])
def test_what_was_said_of_training_rows_is_not_said_again(command, caplog, verb):
    rows = [{"conversations": shared(f"Question {number}", "Yes.", "Really?", "No.")} for number in range(4)]
    done = command(verb, "chatml", rows, data={"eval_size": 1})
    assert done.code == 0
    said = " ".join((done.out if verb == "data" else caplog.text).split())
    assert said.count("answers a conversation") == said.count("'human' is taken as user") == 1
    bot = [{**one, "from": one["from"].replace("gpt", "bot")} for one in rows[0]["conversations"]]
    write("other.jsonl", [{"conversations": bot}])
    done = command("data", "chatml", rows, data={"eval": "other.jsonl", "eval_size": 1})
    assert "'bot' is taken as assistant (1 of 1 rows" in " ".join(done.out.split())


@pytest.mark.parametrize("adapter", ["runs/sft_qwen_gsm8k", "runs/mine", "judge.py"])
def test_a_first_stage_that_is_missing_is_said(command, adapter):
    for verb, *options in (("data",), ("plan",), ("train", "--dry-run")):
        done = command(
            verb, "chatml", [{"question": "2+3", "answer": "5"}], *options, algorithm="grpo", adapter=adapter
        )
        said = " ".join((done.out + done.err).split())
        assert done.code == 0
        assert f"training cannot begin yet: adapter '{adapter}'" in said
        assert ("train sft_qwen_gsm8k" in said) == (adapter == "runs/sft_qwen_gsm8k")


@pytest.mark.parametrize("verb", ["data", "train"])
def test_held_out_rows_that_are_all_bad_are_called_that(command, verb):
    write("held.jsonl", [{"question": "Hi", "answer": ""}] * 2)
    data = {"eval": "held.jsonl", "eval_size": 2, "bad_rows": "drop"}
    done = command(verb, "chatml", [{"question": "Hi", "answer": "Hello."}], data=data)
    assert done.code == 2
    assert "all 2 held-out rows are left out, so none is left to measure" in done.err
    assert not done.run.exists()


def shared(*texts):
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
