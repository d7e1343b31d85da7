"""Training a classifier: it learns what can be learned, is what the reward reads, and does not depend on the split."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_classifiers import FAMILIES, save_classifier, save_sentence_encoder

from lowmem_rlhf.algorithms.classifier.fit import train_classifier
from lowmem_rlhf.algorithms.classifier.update import train_classifier_run
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.sections import LearnedReward, RewardConfig, TrainingConfig
from lowmem_rlhf.report import html
from lowmem_rlhf.rewards import load_rewards

pytestmark = pytest.mark.long

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def toy(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Return texts of two classes: half of the words are any, the others are the class's own."""
    rng = random.Random(seed)
    texts, labels = [], []
    for number in range(count):
        label = ("prose", "verse")[number % 2]
        own = 20 + 10 * (label == "verse")
        words = [rng.choice([rng.randrange(20), own + rng.randrange(10)]) for _ in range(rng.randint(4, 12))]
        texts.append(" ".join(f"w{word}" for word in words))
        labels.append(label)
    return texts, labels


def train(folder, output, data=None, held_out=((), ()), epochs=2, batch_tokens=4096, **changes):
    settings = {"learning_rate": 3e-3, "prompts_per_step": 16, "warmup_steps": 4, **changes}
    start = LearnedReward(model=str(folder), batch_tokens=batch_tokens)
    return train_classifier(data or toy(256, 0), output, start, TrainingConfig(**settings), epochs, held_out)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_it_learns_and_the_reward_reads_it(family, tmp_path):
    start = save_classifier(tmp_path / "start", family, labels={0: "a", 1: "b", 2: "c"})
    held_out = toy(64, 1)
    report = train(start, tmp_path / "style", toy(512, 0), held_out, epochs=6, learning_rate=4e-3)
    assert report.labels == ["prose", "verse"] and len(report.losses) == 6 * 32
    assert sum(report.losses[-8:]) < 0.4 * sum(report.losses[:8])
    assert report.held_out["accuracy"] >= 0.9, report.held_out
    both = report.held_out["accuracy/prose"] + report.held_out["accuracy/verse"]
    assert report.held_out["accuracy"] == pytest.approx(both / 2)
    assert not (tmp_path / "style" / "pytorch_model.bin").exists()

    options = {"model": str(tmp_path / "style"), "label": "verse"}
    reward = load_rewards([RewardConfig(function="classifier", options=options)])[0].function
    values = reward(prompts=[""] * 64, completions=held_out[0])
    right = [(value > 0.5) == (label == "verse") for value, label in zip(values, held_out[1], strict=True)]
    assert sum(right) / 64 == report.held_out["accuracy"]


def test_a_plain_encoder_gets_a_head(tmp_path):
    report = train(save_sentence_encoder(tmp_path / "start"), tmp_path / "style", epochs=1)
    assert len(report.losses) == 16 and not report.held_out


def test_every_split_makes_the_same_classifier(tmp_path):
    start = save_classifier(tmp_path / "start", **NO_DROPOUT)
    reports = {
        name: train(start, tmp_path / name, toy(40, 0), epochs=1, batch_tokens=tokens, learning_rate=1e-3)
        for name, tokens in (("whole", 4096), ("split", 40), ("again", 4096))
    }
    assert len(reports["whole"].losses) == 3, "40 texts are two steps of 16 and one of 8"
    assert reports["split"].losses == pytest.approx(reports["whole"].losses, abs=1e-5)
    states = {name: load_file(tmp_path / name / "model.safetensors") for name in reports}
    for key, value in states["whole"].items():
        # a bias of the keys moves no score, so that its gradient is rounding noise, of which Adam makes whole steps
        assert key.endswith("key.bias") or torch.allclose(value, states["split"][key], atol=1e-4), key
        assert torch.equal(value, states["again"][key]), key
    other = train(start, tmp_path / "other", toy(40, 0), epochs=1, learning_rate=1e-3, seed=1)
    assert other.losses != reports["whole"].losses


def test_it_is_evaluated_while_it_trains_and_ends_early_and_the_rest_is_the_same(tmp_path, monkeypatch):
    """Dropout is on: its random numbers are those of a training without evaluations."""
    monkeypatch.setattr(html, "write_report", lambda run: None)
    start, losses = save_classifier(tmp_path / "start"), {}
    rows = [{"t": text, "l": label} for text, label in zip(*toy(40, 0), strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, values in (("without", {}), ("with", {"steps": 2}), ("early", {"steps": 2, "patience": 2})):
        recipe = validate_recipe(
            {"name": name, "model": str(start), "algorithm": "classifier"}
            | {"data": {"train": str(tmp_path / "rows.jsonl"), "text": "t", "label": "l", "eval_size": 8}}
            | {"training": {"num_train_epochs": 2, "prompts_per_step": 8, "learning_rate": 1e-6}}
            | {"evaluation": {**values, "metric": "accuracy/prose"}, "hardware": {"device": "cpu"}}
        )
        said = Said()
        run = train_classifier_run(recipe, tmp_path / name, False, said)
        losses[name] = [row["loss"] for row in run.metrics()]
        found = run.evaluation()
        if values:
            assert [row["step"] for row in found["during"]] == list(range(2, len(losses[name]) + 1, 2))
            assert found["after"] == found["during"][-1] and found["after"]["headline"] == "accuracy/prose"
            assert {"loss", "accuracy", "accuracy/prose"} <= found["after"]["intervals"].keys()
            assert run.metrics()[1]["eval/loss"] == found["during"][0]["loss"] == said.steps[1]["eval/loss"]
    assert len(losses["without"]) == 8 and losses["with"] == losses["without"]
    assert len(losses["early"]) == 6 and losses["early"] == losses["without"][:6]  # nothing is learned at this rate
    assert found["stopped"] in said.messages and "ends after step 6 of 8" in found["stopped"]


class Said:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.messages, self.steps = [], []
        self.message, self.step = self.messages.append, self.steps.append

    def __getattr__(self, name):
        return lambda *given: None


def test_what_cannot_be_learned_from_is_refused(tmp_path):
    start = save_classifier(tmp_path / "start")

    def refused(message, data, held_out=((), ()), folder=start, output=tmp_path / "new"):
        with pytest.raises(UserError, match=message) as caught:
            train(folder, output, data, held_out)
        assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()

    refused("every text has the label 'a'; a classifier needs texts of at least two", (["w1", "w2"], ["a", "a"]))
    refused("there are no texts", ([], []))
    refused("got 2 texts and 1 labels", (["w1", "w2"], ["a"]))
    refused("training data: text 2 is empty", (["w1", " "], ["a", "b"]))
    refused("label 'c' is not in the training data .a, b.", (["w1", "w2"], ["a", "b"]), (["w1"], ["c"]))
    refused("is taken; choose another folder", toy(4, 0), output=start)
    stripped = shutil.copytree(start, tmp_path / "stripped")
    (stripped / "model.safetensors").unlink()
    refused("has no safetensors weights", toy(4, 0), folder=stripped)
    other = save_classifier(tmp_path / "gpt2", "gpt2")
    (other / "config.json").write_text((start / "config.json").read_text())
    refused("is no encoder that a classifier can be made of: its files lack .*bert", toy(4, 0), folder=other)
    with pytest.raises(UserError, match="dtype: got 'float16'; a classifier is trained in float32"):
        train_classifier(
            toy(4, 0), tmp_path / "new", LearnedReward(model=str(start), dtype="float16"), TrainingConfig()
        )


def test_every_family_can_be_trained(tmp_path):
    for family in FAMILIES:
        report = train(save_classifier(tmp_path / family, family), tmp_path / f"{family}-style", toy(32, 0), epochs=1)
        assert len(report.losses) == 2


def test_minilm_learns_shakespeare(minilm, shared, tmp_path):
    """A real encoder tells Shakespeare from film reviews after a few steps."""
    plays = (shared / "data" / "style" / "shakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    plays = [" ".join(part.split()[:25]) for part in plays if len(part.split()) > 12]
    reviews = (shared / "data" / "style" / "movie_reviews.pos.txt").read_text(encoding="utf-8").splitlines()
    reviews = [" ".join(line.split()[:25]) for line in reviews if len(line.split()) > 12]
    rng = random.Random(0)
    rows = [(text, "verse") for text in rng.sample(plays, 128)] + [(text, "film") for text in rng.sample(reviews, 128)]
    rng.shuffle(rows)
    train_rows, test_rows = rows[:160], rows[160:]
    report = train(
        minilm,
        tmp_path / "style",
        tuple(zip(*train_rows, strict=True)),
        tuple(zip(*test_rows, strict=True)),
        epochs=1,
        learning_rate=3e-4,
        warmup_steps=2,
    )
    assert report.held_out["accuracy"] >= 0.9, report.held_out
