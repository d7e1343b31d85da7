"""Whole runs with learned rewards."""

from pathlib import Path

import pytest
import torch
from tiny_classifiers import save_classifier, save_sentence_encoder
from tiny_runs import learned, tiny_recipe, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lowmem_rlhf.display.run_display import ConsoleDisplay
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.session.train import train

ROWS = [{"question": f"{n}+{n}=", "solution": f"{2 * n}"} for n in range(1, 13)]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path):
    """Return a function that makes a tiny recipe with a classifier, a similarity and a heuristic as rewards."""
    bert, encoder = save_classifier(tmp_path / "bert"), save_sentence_encoder(tmp_path / "encoder")
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), "template": None, "train_size": None}
    data |= {"prompt": "question", "answer": "solution"}

    def make(**options):
        style = {"model": str(bert), "label": "verse", "batch_tokens": 64, **options}
        alike = {"model": str(encoder), "column": "solution"}
        rewards = [
            {"function": "classifier", "name": "style", "weight": 2.0, "options": style},
            {"function": "similarity", "options": alike},
            {"function": "length", "weight": 0.1, "options": {"target": 12}},
        ]
        return tiny_recipe(tiny_model, data=data, rewards=rewards)

    return make


def test_learned_rewards_train_the_policy(recipe, tmp_path, capsys):
    run = train(recipe(), tmp_path / "run", display=ConsoleDisplay())
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    samples = run.samples()
    assert len({sample["rewards"]["style"] for sample in samples}) > 4
    for sample in samples:
        text, rewards = sample["completion"], sample["rewards"]
        expected = 0.0
        if text.strip():
            expected = float(model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 2])
        assert rewards["style"] == pytest.approx(expected, abs=1e-6)
    for row in run.metrics():
        parts = 2 * row["reward/style"] + row["reward/similarity"] + 0.1 * row["reward/length"]
        assert row["reward/mean"] == pytest.approx(parts, abs=1e-6)
    assert set(run.evaluation()["after"]) >= {"reward/style", "reward/similarity"}
    reason = "the policy computes on the CPU, too"
    assert run.plan()["rewards"]["style"] == {"model": str(tmp_path / "bert"), "device": "cpu", "reason": reason}
    assert "learned reward" in capsys.readouterr().out
    again = learned(train(recipe(), tmp_path / "again"))
    assert again["metrics"] == learned(run)["metrics"] and again["evaluation"] == run.evaluation()


def test_a_wrong_classifier_ends_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(UserError, match=r"rewards: style: label: got 'vers'; .* did you mean 'verse'"):
        train(recipe(label="vers"), tmp_path / "run")
    write_jsonl(tmp_path / "rows.jsonl", [{"question": row["question"]} for row in ROWS])
    broken = recipe()
    broken.data.answer = None
    with pytest.raises(UserError, match="similarity needs a column 'solution', which the data lacks"):
        train(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_classifier_that_breaks_ends_the_run_with_one_sentence(recipe, tmp_path):
    ready = recipe(output="logit")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    torch.nn.init.constant_(model.classifier.weight, 3e38)
    model.save_pretrained(tmp_path / "bert")
    with pytest.raises(RunError, match=r"reward style: its model gives .*; its weights are broken"):
        train(ready, tmp_path / "run")
