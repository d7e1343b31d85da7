"""The similarity reward against the plain computation in transformers: pooling, normalisation, and the real MiniLM."""

import json
from pathlib import Path

import pytest
import torch
from test_learned import load, refused, rewards_of, texts
from tiny_classifiers import save_sentence_encoder
from transformers import AutoModel, AutoTokenizer

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.rewards import check_reward_columns


@torch.no_grad()
def plain_embedding(folder: Path | str, text: str, max_length: int, mode: str = "mean") -> torch.Tensor:
    """Return sentence-transformers' embedding of one text: pooled over its tokens, then of length 1."""
    ids = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=max_length, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder).eval()(input_ids=ids["input_ids"]).last_hidden_state[0]  # (T, H)
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[mode]
    return vector / vector.norm()


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"embedding_dimension": 32}, "mean"),
    ],
)
def test_pooling_is_what_the_model_s_files_say(tmp_path, config, mode):
    folder = save_sentence_encoder(tmp_path / "encoder", config)
    reward = load("similarity", model=folder, batch_tokens=50)
    assert reward.function.encoder.max_length == 20
    given, wanted = texts()[:12], texts()[12:]
    expected = [
        float(plain_embedding(folder, a, 20, mode) @ plain_embedding(folder, b, 20, mode))
        for a, b in zip(given, wanted, strict=True)
    ]
    assert rewards_of(reward, given, answer=wanted) == pytest.approx(expected, abs=1e-6)
    assert rewards_of(reward, given, answer=given) == pytest.approx([1.0] * 12, abs=1e-6)


def test_a_plain_encoder_is_pooled_by_the_mean(tmp_path):
    folder = save_sentence_encoder(tmp_path / "encoder")
    for file in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (folder / file).unlink()
    reward = load("similarity", model=folder)
    assert (reward.function.pooling, reward.function.encoder.max_length) == ("mean", 64)


def test_other_embeddings_are_refused(tmp_path):
    folder = save_sentence_encoder(tmp_path / "a", {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True})
    refused("pools by mean and lasttoken; known are mean, cls, max", "similarity", model=folder)
    folder = save_sentence_encoder(tmp_path / "b")
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    refused("has a layer Dense after its encoder, which is not known here", "similarity", model=folder)
    (folder / "modules.json").write_text("[")
    refused("its modules.json is not JSON", "similarity", model=folder)


def test_empty_texts_and_absent_references(tmp_path):
    reward = load("similarity", model=save_sentence_encoder(tmp_path / "encoder"))
    given, wanted = ["", "w1", "w1", "w1", " \n"], ["w1", None, " ", 5, "w2"]
    values = rewards_of(reward, given, answer=wanted)
    assert values[:3] == [0.0, None, None] and values[3] != 0 and values[4] == 0.0
    assert rewards_of(reward, [], answer=[]) == []


def test_the_reference_s_column(tmp_path):
    folder = save_sentence_encoder(tmp_path / "encoder")
    reward = load("similarity", model=folder, column="solution")
    assert rewards_of(reward, ["w1"], solution=["w1"], answer=["w2"]) == pytest.approx([1.0], abs=1e-6)
    check_reward_columns([reward], ["question", "solution"])
    message = r"similarity needs a column 'solution', which the data lacks; did you mean 'Solutions'\?"
    with pytest.raises(UserError, match=message):
        check_reward_columns([reward], ["question", "Solutions"])


def test_minilm(minilm):
    """The real all-MiniLM-L6-v2: it knows what is alike, and the embeddings are sentence-transformers'."""
    reward = load("similarity", model=minilm, batch_tokens=60)
    assert (reward.function.pooling, reward.function.encoder.max_length) == ("mean", 256)
    question = "How old is the cat?"
    given = ["What is the age of the cat?", "The cat is asleep.", "Interest rates rose by two percent."]
    values = rewards_of(reward, given, answer=[question] * 3)
    assert values[0] > 0.8 and values[0] > values[1] + 0.2 and values[1] > values[2] + 0.2

    from lowmem_rlhf.architecture.source import resolve_model

    folder = resolve_model(minilm)
    long = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May. " * 30
    own = reward.function.embed([*given, question, long])
    expected = torch.stack([plain_embedding(folder, text, 256) for text in [*given, question, long]])
    assert torch.allclose(own, expected, atol=1e-6)
    # the first numbers of sentence-transformers 6.2's own embedding of the first text
    assert own[0, :4].tolist() == pytest.approx([0.0874394, 0.0665164, -0.0178260, 0.0680694], abs=1e-5)
