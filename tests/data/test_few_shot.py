"""Solved examples before each prompt, from a file and from a column, in chats and plain prompts."""

import pytest
from tiny_runs import save_tiny_model, tiny_recipe, write_jsonl

from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.data.few_shot import KEY
from lowmem_rlhf.data.prompts import build_examples
from lowmem_rlhf.data.supervised import build_supervised
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.local_paths import without_folders
from lowmem_rlhf.inference.chat.talk import Prompts
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.sections import DataConfig
from lowmem_rlhf.report import html
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.online import Trainer

ROWS = [{"question": "2 + 3", "answer": "5"}]
SOLVED = [{"question": "1 + 1", "answer": "2", "why": "One and one make 2."}, {"question": "4 + 2", "answer": 6}]


@pytest.fixture
def file(tmp_path):
    return str(write_jsonl(tmp_path / "solved.jsonl", SOLVED))


def data(**given):
    return DataConfig(train="rows.jsonl", **given)


def test_a_chat_has_them_as_turns_behind_the_system_message(chat_tokenizer, file):
    section = data(few_shot={"file": file}, system="Be brief.", template="What is {question}?")
    (example,) = build_examples(ROWS, section, chat_tokenizer)
    assert [(one["role"], one["content"]) for one in example.prompt] == [
        ("system", "Be brief."),
        *[("user", "What is 1 + 1?"), ("assistant", "2"), ("user", "What is 4 + 2?"), ("assistant", "6")],
        ("user", "What is 2 + 3?"),
    ]
    ids = chat_tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True)["input_ids"]
    assert example.prompt_ids == ids and example.columns["answer"] == "5"


def test_a_plain_prompt_has_them_as_sft_writes_them(chat_tokenizer, file):
    section = data(
        few_shot={"file": file, "count": 1},
        chat=False,
        template="Q: {question}\nA:",
        system="Add.",
        completion="answer",
    )
    (example,) = build_examples(ROWS, section, chat_tokenizer)
    assert example.prompt == "Add.\n\nQ: 1 + 1\nA:\n2\n\nQ: 2 + 3\nA:"
    (learned,) = build_supervised(ROWS, section, SFTSettings(), chat_tokenizer, frozenset())
    assert learned.prompt_ids == example.prompt_ids and chat_tokenizer.decode(learned.completion_ids).startswith("\n5")
    reasons = data(few_shot={"file": file, "count": 1, "answer": "why"}, chat=False, template="Q: {question}\nA: ")
    assert build_examples(ROWS, reasons, chat_tokenizer)[0].prompt.startswith("Q: 1 + 1\nA: One and one make 2.\n\nQ")


def test_a_column_has_the_examples_of_its_row(chat_tokenizer):
    rows = [{**ROWS[0], "shots": SOLVED[:1]}, {**ROWS[0], "shots": None}]
    section = data(few_shot={"column": "shots"}, chat=False)
    assert [one.prompt for one in build_examples(rows, section, chat_tokenizer)] == ["1 + 1\n2\n\n2 + 3", "2 + 3"]
    with pytest.raises(UserError, match="column 'shots' must hold the solved examples of its row"):
        build_examples([{**ROWS[0], "shots": "1 + 1 = 2"}], section, chat_tokenizer)


def test_what_a_user_types_is_a_prompt_as_in_training(chat_tokenizer, file):
    for chat in (True, False):
        section = data(few_shot={"file": file}, system="Be brief.", template="What is {question}?", chat=chat)
        prompts = Prompts(section, chat_tokenizer)
        assert prompts.ids(prompts.turn("2 + 3"), []) == build_examples(ROWS, section, chat_tokenizer)[0].prompt_ids


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"few_shot": {}}, "data.few_shot: file or column is missing; give the one that the examples are in"),
        ({"few_shot": {"file": "a.jsonl", "column": "b"}}, "data.few_shot: got both file and column"),
        ({"few_shot": {"column": "b"}, "messages": "m"}, "data.few_shot: its examples are written as the prompts of"),
    ],
)
def test_a_recipe_that_makes_no_sense(given, words):
    with pytest.raises(UserError) as caught:
        validate_recipe({"model": "m", "algorithm": "sft", "data": {"train": "r.jsonl", **given}})
    assert words in str(caught.value)


def test_a_file_that_is_not_there_and_one_without_answers(chat_tokenizer, tmp_path):
    with pytest.raises(UserError, match=rf"{KEY}.file: there is no file .*gone.jsonl"):
        build_examples(ROWS, data(few_shot={"file": str(tmp_path / "gone.jsonl")}), chat_tokenizer)
    bad = write_jsonl(tmp_path / "bad.jsonl", [*SOLVED, {"question": "1 + 2"}])
    with pytest.raises(UserError, match=r"row 3 of .*bad.jsonl: a solved example has no answer in column 'answer'"):
        build_examples(ROWS, data(few_shot={"file": str(bad)}), chat_tokenizer)


def test_a_resume_refuses_other_examples(tmp_path, file, monkeypatch):
    monkeypatch.setattr(html, "write_report", lambda run: None)
    model = save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    section = {"few_shot": {"file": "solved.jsonl"}, "max_prompt_length": 64, "eval_size": 2}
    recipe = tiny_recipe(model, data=section, training={"max_steps": 2, "save_steps": 1, "prompts_per_step": 1})
    rollout = Trainer._rollout

    def stopped(self, progress):
        if self.step == 1:
            raise KeyboardInterrupt
        return rollout(self, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_rollout", stopped)
        train(recipe, tmp_path / "run")
    assert without_folders({"data": {"few_shot": {"file": file}}})[0]["data"]["few_shot"]["file"] == "solved.jsonl"
    kept = write_jsonl(tmp_path / "kept.jsonl", SOLVED).read_text()
    write_jsonl(tmp_path / "solved.jsonl", SOLVED[:1])
    with pytest.raises(
        UserError, match=r"the examples of .*solved.jsonl are not those that the run began with .2 rows"
    ):
        train(recipe, tmp_path / "run", resume=True)
    (tmp_path / "solved.jsonl").write_text(kept)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(train(recipe, tmp_path / "run", resume=True).metrics()) == 2
