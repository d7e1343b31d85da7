"""Learned rewards against the plain computation in transformers, one text at a time and without padding."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_classifiers import FAMILIES, LABELS, WORDS, save_classifier, save_sentence_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.planning.placement import encoder_pass_bytes, reward_bytes, reward_device
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.sections import RewardConfig
from lowmem_rlhf.rewards import Reward, load_rewards, placements, score
from lowmem_rlhf.rewards.encoder import batches_by_tokens

GIB = 2**30


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return a classifier of three classes of every family."""
    root = tmp_path_factory.mktemp("classifiers")
    return {family: save_classifier(root / family, family) for family in FAMILIES}


def texts(count: int = 24, longest: int = 30) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS[:40], k=rng.randint(1, longest))) for _ in range(count)]


def load(function: str = "classifier", **options: Any) -> Reward:
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return load_rewards([RewardConfig(function=function, options=options)])[0]


def rewards_of(reward: Reward, completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> list[Any]:
    prompts = prompts or [""] * len(completions)
    return score([reward], prompts, completions, [[]] * len(completions), columns).by_name[reward.name]


@torch.no_grad()
def plain_logits(folder: Path, text: str, **kwargs: Any) -> torch.Tensor:
    """Return the logits of one text, (C,)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", **kwargs)["input_ids"]
    return model(input_ids=ids).logits[0]


def refused(message: str, function: str = "classifier", **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(function, **options)
    assert str(caught.value).startswith(f"rewards: {function}: ") and "\n" not in str(caught.value)


# Batches


def test_batches_hold_every_text_once_and_no_more_than_the_padded_tokens():
    rng = random.Random(1)
    for _ in range(50):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(0, 40))]
        batches = batches_by_tokens(lengths, 100)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) * max(lengths[i] for i in batch) <= 100
    assert batches_by_tokens([5, 90, 5], 20) == [[1], [0, 2]], "a longer text makes a batch of its own"


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_give_what_one_text_at_a_time_gives(folders, family):
    reward = load(model=folders[family], label=1, batch_tokens=80)
    expected = [float(plain_logits(folders[family], text).softmax(-1)[1]) for text in texts()]
    assert max(expected) - min(expected) > 0.1, "the scores tell nothing apart"
    assert rewards_of(reward, texts()) == pytest.approx(expected, abs=1e-6)
    chat = [[{"role": "assistant", "content": text}] for text in texts()]
    assert rewards_of(reward, chat) == rewards_of(reward, texts())


def test_repeated_texts_are_read_once_and_passes_keep_within_their_tokens(folders):
    reward = load(model=folders["bert"], label=1, batch_tokens=70)
    model, shapes = reward.function.encoder.model, []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    once = rewards_of(reward, texts())
    seen = sum(rows for rows, _ in shapes)
    assert seen == len(set(texts())) and len(shapes) > 1 and max(rows * width for rows, width in shapes) <= 70
    assert rewards_of(reward, texts() + texts()[::-1]) == once + once[::-1]
    assert sum(rows for rows, _ in shapes) == 2 * seen
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_memory_that_runs_out_halves_the_batches(folders, monkeypatch, caplog):
    reward = load(model=folders["bert"], label=1, batch_tokens=400)
    encoder = reward.function.encoder
    expected, whole = rewards_of(reward, texts()), encoder._pass

    def small_card(room: int) -> None:
        def tried(ids: list[list[int]], head: Any) -> torch.Tensor:
            if len(ids) * max(len(one) for one in ids) > room:
                raise torch.OutOfMemoryError("out of memory")
            return whole(ids, head)

        monkeypatch.setattr(encoder, "_pass", tried)

    small_card(150)
    assert rewards_of(reward, texts()) == pytest.approx(expected, abs=1e-6)
    assert encoder.batch_tokens == 100 and "the reward's batch_tokens=400; going on with 200" in caplog.text
    small_card(10)
    with pytest.raises(RunError, match=r"reward classifier: .* ran out even with the reward's batch_tokens=\d+"):
        rewards_of(reward, texts())


def test_nothing_is_made_on_the_default_device(folders):
    expected = rewards_of(load(model=folders["roberta"], label=1), texts())
    with torch.device("meta"):
        assert rewards_of(load(model=folders["roberta"], label=1), texts()) == expected


# The classifier


def test_outputs(folders, tmp_path):
    logits = plain_logits(folders["bert"], "w1 w2 w3")
    for output, expected in (
        ("probability", logits.softmax(-1)),
        ("logit", logits),
        ("log_probability", logits.log_softmax(-1)),
    ):
        for index in range(3):
            (value,) = rewards_of(load(model=folders["bert"], label=index, output=output), ["w1 w2 w3"])
            assert value == pytest.approx(float(expected[index]), abs=1e-6)

    single = save_classifier(tmp_path / "single", labels={0: "good"})
    logit = plain_logits(single, "w5")
    assert rewards_of(load(model=single), ["w5"]) == pytest.approx([float(logit.sigmoid())], abs=1e-6)
    assert rewards_of(load(model=single, output="logit"), ["w5"]) == pytest.approx([float(logit)], abs=1e-6)
    several = save_classifier(tmp_path / "several", problem_type="multi_label_classification")
    logits = plain_logits(several, "w5")
    expected = float(torch.nn.functional.logsigmoid(logits)[2])
    assert rewards_of(load(model=several, label=2, output="log_probability"), ["w5"]) == pytest.approx([expected], 1e-6)


def test_labels(folders):
    by_name = [rewards_of(load(model=folders["bert"], label=name), texts(3)) for name in LABELS.values()]
    assert by_name == [rewards_of(load(model=folders["bert"], label=index), texts(3)) for index in LABELS]
    assert by_name[0] != by_name[1]
    known = "the labels of model '.*' are 0 'OTHER', 1 'Drama', 2 'verse'"
    refused(rf"label: got 'drama'; {known}; did you mean 'Drama'\?$", model=folders["bert"], label="drama")
    refused(rf"label: got 3; {known}$", model=folders["bert"], label=3)
    refused(rf"label: missing; {known}$", model=folders["bert"])


def test_the_prompt_is_read_with_the_completion(folders, tmp_path):
    options = {"model": folders["bert"], "label": 1, "output": "logit"}
    reward = load(**options, text="prompt_and_completion")
    expected = rewards_of(load(**options), ["w1 w2 w3 w4"])
    assert rewards_of(reward, [" w3 w4"], ["w1 w2"]) == expected
    chat = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    assert rewards_of(reward, [[{"role": "assistant", "content": "w3 w4"}]], [chat]) == expected
    assert rewards_of(load(**options), ["w3 w4"], ["w1 w2"]) != expected

    folder = shutil.copytree(folders["bert"], tmp_path / "templated")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m.content }} [SEP] {% endfor %}"
    tokenizer.save_pretrained(folder)
    reward = load(**{**options, "model": folder}, text="prompt_and_completion")
    logits = plain_logits(folder, "w9 w1 [SEP] w9 w2 [SEP] w9 w3 w4 [SEP]", add_special_tokens=False)
    values = rewards_of(reward, [[{"role": "assistant", "content": "w3 w4"}]], [chat])
    assert values == pytest.approx([float(logits[1])], abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_is_too_long_keeps_its_start_and_after_a_prompt_its_end(folders, family):
    words = [f"w{n % 40}" for n in range(300)]
    special = 0 if family == "gpt2" else 2
    options = {"model": folders[family], "label": 1, "output": "logit"}
    assert load(**options).function.encoder.max_length == 64
    start, end = (" ".join(part) for part in (words[: 64 - special], words[-(64 - special) :]))
    assert rewards_of(load(**options), [" ".join(words)]) == pytest.approx(
        [float(plain_logits(folders[family], start)[1])], abs=1e-5
    )
    reward = load(**options, text="prompt_and_completion")
    whole = rewards_of(reward, [" " + " ".join(words[200:])], [" ".join(words[:200])])
    assert whole == pytest.approx([float(plain_logits(folders[family], end)[1])], abs=1e-5)
    shorter = load(**options, max_length=10)
    (value,) = rewards_of(shorter, [" ".join(words)])
    assert value == pytest.approx(float(plain_logits(folders[family], " ".join(words[: 10 - special]))[1]), abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_an_empty_completion(folders, family):
    given = ["", " \n", "w1"]
    probabilities = rewards_of(load(model=folders[family], label=1), given)
    assert probabilities[:2] == [0.0, 0.0] and probabilities[2] > 0
    logits = rewards_of(load(model=folders[family], label=1, output="logit"), given)
    assert logits[0] == pytest.approx(logits[1], abs=1e-6) and logits[0] != logits[2]
    if family == "bert":
        assert logits[0] == pytest.approx(float(plain_logits(folders[family], "")[1]), abs=1e-6)
    assert rewards_of(load(model=folders[family], label=1), []) == []


def test_what_is_no_classifier_is_refused(folders, tmp_path):
    encoder = save_sentence_encoder(tmp_path / "encoder")
    refused(
        r"is no sequence classifier: its files lack 2 tensors \(classifier.bias, classifier.weight\)",
        model=encoder,
        label=0,
    )
    refused("model 'no/where/there' does not exist", model="no/where/there", label=0)
    refused("cannot be loaded: .*connect.*; give a Hub id that can be reached", model="nobody/nothing", label=0)
    refused("the Python package not_here is not installed", model="package:not_here/model", label=0)

    def copy(name: str) -> Path:
        return shutil.copytree(folders["bert"], tmp_path / name)

    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused("holds its weights as pytorch_model.bin, which can only be read by unpickling it", model=pickled, label=0)
    torn = copy("torn")
    (torn / "model.safetensors").write_bytes(b"torn")
    refused("model.safetensors is no safetensors file", model=torn, label=0)
    own_code = copy("own_code")
    code = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}}
    (own_code / "config.json").write_text(json.dumps(code))
    (own_code / "own.py").write_text("raise SystemExit('it ran')")
    refused("needs Python code of its own, which a reward never runs", model=own_code, label=0)
    speech = copy("speech")
    (speech / "config.json").write_text(json.dumps({"model_type": "vits"}))
    refused("is no sequence classifier: transformers has none of its architecture", model=speech, label=0)
    silent = copy("silent")
    for file in silent.glob("tokenizer*"):
        file.unlink()
    refused("comes without its tokenizer", model=silent, label=0)
    other = save_classifier(tmp_path / "other", vocab_size=20)
    refused("has the wrong tokenizer: it knows 67 tokens, and the model 20", model=other, label=0)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    refused("is a GGUF file, and a sequence classifier is read from a folder", model=gguf, label=0)
    regression = save_classifier(tmp_path / "regression", labels={0: "stars"}, problem_type="regression")
    refused("output: got 'probability', but .* is a regression, .* take output=logit", model=regression)
    assert rewards_of(load(model=regression, output="logit"), ["w1"])


def test_options_the_model_or_the_machine_lacks_are_refused(folders):
    refused("max_length: got 65; model '.*' reads 3 to 64 tokens", model=folders["bert"], label=0, max_length=65)
    refused("max_length: got 2; model '.*' reads 3 to 64 tokens", model=folders["roberta"], label=0, max_length=2)
    refused("device 'gpu' is not", model=folders["bert"], label=0, device="gpu")
    if not torch.cuda.is_available():
        refused("cuda", model=folders["bert"], label=0, device="cuda:7")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(folders, tmp_path, value):
    folder = shutil.copytree(folders["bert"], tmp_path / "broken")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier.weight.data[1, 2] = value
    model.save_pretrained(folder)
    refused(r"model '.*broken' .*not finite in 1 tensor \(classifier\.weight\)", model=folder, label=0)


def test_weights_that_are_numbers_in_float32_alone_are_refused_in_float16(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "large")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier.weight.data[1, 2] = 1e6
    model.save_pretrained(folder)
    refused(r"not finite in 1 tensor \(classifier\.weight\).*float32", model=folder, label=0, dtype="float16")


def test_weights_that_give_no_numbers_end_the_run_with_a_sentence(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "broken")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.classifier.weight, 3e38)  # numbers, whose products are none
    torch.nn.init.constant_(model.classifier.bias, 3e38)
    model.save_pretrained(folder)
    for dtype, hint in (("float32", "its weights are broken"), ("bfloat16", "set its option dtype=float32")):
        with pytest.raises(
            RunError, match=rf"its model gives \[.* for the text 'w1'; {hint} \(model '.*broken', text 1"
        ):
            rewards_of(load(model=folder, label=0, dtype=dtype), ["w1", "w2 w3"])


def test_bfloat16_is_close(folders):
    expected = rewards_of(load(model=folders["bert"], label=1), texts())
    reward = load(model=folders["bert"], label=1, dtype="bfloat16")
    assert reward.function.encoder.model.dtype == torch.bfloat16
    assert rewards_of(reward, texts()) == pytest.approx(expected, abs=0.05)


# Options in a recipe


def refusal(*options: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", [f"rewards=[{{function: classifier, options: {{{', '.join(options)}}}}}]"])
    return str(caught.value)


def test_options_are_checked_with_the_recipe_all_at_once():
    message = refusal("modle: x", "output: probabilty", "batch_tokens: 0", "label: 1.5", "max_length: long")
    for line in (
        "rewards[0].options.modle: unknown key; did you mean 'model'? (allowed: model, revision, device, dtype,",
        "rewards[0].options.model: missing; it has to be given",
        "rewards[0].options.output: got 'probabilty'; it should be 'probability', 'logit' or 'log_probability'",
        "rewards[0].options.batch_tokens: got 0; it should be at least 1",
        "rewards[0].options.label: got 1.5; it should be a whole number or a text",
        "rewards[0].options.max_length: got 'long'; it should be a whole number",
    ):
        assert f"  {line}" in message, message
    assert "true or false" not in message and "label: got true" in refusal("model: x", "label: true")
    assert "column: unknown key" in refusal("model: x", "label: 1", "column: answer")


def test_a_resolved_recipe_shows_every_option_and_loads_again():
    recipe = load_recipe("quickstart", ["rewards=[{function: similarity, options: {column: solution}}]"])
    options = recipe.rewards[0].options
    assert options["model"] == "sentence-transformers/all-MiniLM-L6-v2" and options["column"] == "solution"
    assert type(recipe).model_validate(recipe.model_dump()) == recipe


# Where it computes


def test_a_reward_lies_beside_the_policy_where_the_plan_leaves_room():
    need = reward_bytes(GIB, GIB // 2, "cuda:0")
    assert need == round(1.5 * GIB * 1.125)
    assert reward_device(GIB, GIB // 2, "cuda:0", need) == (
        "cuda:0",
        "its 1.69 GiB fit beside the policy, where the plan leaves 1.69 GiB",
    )
    device, reason = reward_device(GIB, GIB // 2, "cuda:0", need - 1)
    assert device == "cpu" and "do not fit" in reason
    assert reward_device(GIB, 0, "cuda:0", -5)[1].endswith("leaves 0.00 GiB")
    assert reward_device(GIB, 0, "cpu", 0) == ("cpu", "the policy computes on the CPU, too")
    # BERT-base, a batch of the default size: about 160 MB beside 440 MB of weights
    assert 0.1e9 < encoder_pass_bytes(768, 3072, 4096, 512, 4) < 0.3e9


def test_placements(folders):
    rewards = load_rewards(
        [
            RewardConfig(function="classifier", name="style", options={"model": str(folders["bert"]), "label": 1}),
            RewardConfig(function="length", options={"target": 5}),
        ],
        device="cpu",
    )
    reason = "the policy computes on the CPU, too"
    assert placements(rewards) == {"style": {"model": str(folders["bert"]), "device": "cpu", "reason": reason}}
    assert load(model=folders["bert"], label=1, device="cpu").placement["reason"] == "set in the recipe"
    encoder = rewards[0].function.encoder
    stored = AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    assert encoder.weight_bytes >= 4 * stored.num_parameters() and encoder.work_bytes > 0
