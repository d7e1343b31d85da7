"""Whole runs of the stages beside online training: SFT, reward model, classifier, and what goes on from them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from reports import data_of
from safetensors.torch import load_file
from tiny_classifiers import save_classifier
from tiny_runs import save_tiny_model, tiny_recipe, tiny_values, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lowmem_rlhf.recipe.loading import load_recipe, validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.report import html
from lowmem_rlhf.rewards.adapter import AdapterReward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import measures
from lowmem_rlhf.session.train import train

RANK = 3  # of the adapters that others continue; the recipes' own default is 16
LORA = {"r": RANK, "lora_alpha": 6.0}
PLAIN = {"template": None, "train_size": None, "prompt": "prompt", "answer": None}
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": "12", "rejected": "abc"} for a in range(8) for b in range(2)]
TEXTS = [{"text": f"{n % 7} + {n % 3} a" if n % 2 else f"b {n % 5} - c", "label": "ab"[n % 2]} for n in range(44)]
LABELLED = {"text": "text", "label": "label", "template": None, "train_size": None}
write_report = html.write_report


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """One thread for the runs of fixtures too, and no report, which is not what they test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_report", lambda run: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return the folder of all runs here, with the data that they learn from."""
    folder = tmp_path_factory.mktemp("stages")
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "texts.jsonl", TEXTS)
    save_classifier(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def sft(runs: Path, tiny_model: Path) -> RunDirectory:
    """A run of SFT whose held-out completions are judged by a reward, with its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_report", write_report)
        changes = {"lora": LORA, "sft": {"max_length": 32, "eval_steps": 2}}
        return train(tiny_recipe(tiny_model, algorithm="sft", **changes), runs / "sft")


@pytest.fixture(scope="module")
def reward_model(runs: Path, tiny_model: Path) -> RunDirectory:
    return train(reward_recipe(runs, tiny_model), runs / "reward")


@pytest.fixture(scope="module")
def classifier(runs: Path) -> RunDirectory:
    return train(classifier_recipe(runs), runs / "classifier")


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's values with keys of its sections replaced."""
    return values | {k: {**values.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}


def reward_recipe(runs: Path, model: Path, **changes: Any) -> Recipe:
    data = {**PLAIN, "train": str(runs / "pairs.jsonl")}
    settings = {"lora": LORA, "rewards": [], "data": data, "reward_model": {"max_length": 32}, **changes}
    return tiny_recipe(model, algorithm="reward_model", **settings)


def classifier_recipe(runs: Path) -> Recipe:
    data = {**LABELLED, "train": str(runs / "texts.jsonl")}
    training = {"num_train_epochs": 2, "prompts_per_step": 16, "learning_rate": 3e-3}
    return tiny_recipe(runs / "bert", algorithm="classifier", rewards=[], data=data, training=training)


def online(model: Path, **changes: Any) -> Recipe:
    """Return a recipe of GRPO that leaves the adapter's shape out."""
    values = changed(tiny_values(model), {"training": {"max_steps": 2}})
    del values["lora"]
    return validate_recipe(changed(values, changes))


def adapter_config(run: RunDirectory) -> dict[str, Any]:
    return json.loads((run.path / "adapter" / "adapter_config.json").read_text())


# What is written


def test_sft_writes_what_every_run_writes(sft, tiny_model):
    assert load_recipe(str(sft.path / "recipe.yaml")).algorithm == "sft"
    plan = sft.plan()
    assert plan["fits"] and plan["rewards"] == {} and {"update", "export"} < set(plan["memory"]["phases"])
    rows = sft.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        keys = {"loss", "entropy", "grad_norm", "learning_rate", "tokens/learned", "tokens/trained", "time/step"}
        assert keys | {"time/update", "memory/peak_bytes"} <= row.keys()
        assert row["grad_norm"] > 0 and row["tokens/trained"] > row["tokens/learned"] > 0
    assert rows[2]["loss"] < rows[0]["loss"]
    assert ["eval/loss" in row for row in rows] == [False, True, False]
    weights = load_file(sft.path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in weights.values()) and adapter_config(sft)["r"] == RANK
    assert not (sft.path / "adapter" / "head.safetensors").exists()
    assert data_of(sft.path / "report.html")["run"]["name"] == "tiny"
    assert sft.latest_checkpoint()[0] == 3


def test_sft_is_judged_by_its_loss_and_by_its_rewards(sft):
    before, after = sft.evaluation()["before"], sft.evaluation()["after"]
    assert after["loss"] < before["loss"] and after["perplexity"] < before["perplexity"]
    for found in (before, after):
        assert {"accuracy", "reward/mean", "reward/length", "completion/mean_length"} < found.keys()
        assert found["problems"] == 4 and 0 <= found["accuracy"] <= 1
    assert before["reward/length"] != after["reward/length"]
    assert "rollout" in sft.plan()["memory"]["phases"]


def test_sft_without_rewards_samples_nothing_and_counts_epochs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_rlhf.rollout.wave.WaveEngine.generate", lambda *args, **settings: 1 / 0)
    training = {"num_train_epochs": 2, "prompts_per_step": 5}
    recipe = tiny_recipe(tiny_model, algorithm="sft", rewards=[], sft={"max_length": 32}, training=training)
    run = train(recipe, tmp_path / "run")
    assert set(run.plan()["memory"]["phases"]) == {"scoring", "update", "optimizer", "export"}
    assert len(run.metrics()) == 7  # 16 examples, twice
    kept = run.recipe_values()["training"]
    assert kept["num_train_epochs"] == 2 and "max_steps" not in kept
    after = run.evaluation()["after"]
    more = {"headline", "intervals"}
    assert set(after) == {"loss", "perplexity", "accuracy", "problems", *more} and after["accuracy"] is None
    again = train(load_recipe(str(run.path / "recipe.yaml")), run.path, resume=True)  # it has nothing left to do
    assert again.evaluation() == run.evaluation() and len(again.metrics()) == 7


def test_a_reward_model_learns_to_tell_its_pairs(reward_model):
    assert load_recipe(str(reward_model.path / "recipe.yaml")).data.chosen == "chosen"
    assert set(reward_model.plan()["memory"]["phases"]) == {"scoring", "update", "optimizer", "export"}
    for row in reward_model.metrics():
        assert {"loss", "accuracy", "score/margin", "score/mean", "grad_norm", "tokens/trained"} <= row.keys()
    before, after = reward_model.evaluation()["before"], reward_model.evaluation()["after"]
    assert set(after) == {"loss", "accuracy", "score/margin", "score/mean", "problems", "headline", "intervals"}
    assert after["loss"] < before["loss"] and after["accuracy"] == 1
    head = load_file(reward_model.path / "adapter" / "head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (1, 64)}
    checkpoint = reward_model.latest_checkpoint()[1]
    assert torch.equal(load_file(checkpoint / "head.safetensors")["weight"], head["weight"])


def test_a_classifier_is_a_model_of_its_own(classifier):
    rows = classifier.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # 40 texts, twice, in steps of 16, 16 and 8
    assert classifier.recipe_values()["training"]["num_train_epochs"] == 2
    assert rows[-1]["loss"] < rows[0]["loss"] and all(row["time/step"] > 0 for row in rows)
    assert {"loss", "accuracy", "accuracy/a", "accuracy/b"} < set(classifier.evaluation()["after"])
    model = AutoModelForSequenceClassification.from_pretrained(classifier.path / "model")
    assert model.config.id2label == {0: "a", 1: "b"}
    assert not (classifier.path / "adapter").exists() and classifier.plan()["settings"] == {"quantization": "none"}


def test_a_report_is_drawn_of_every_kind_of_run(sft, reward_model, classifier):
    for run in (reward_model, classifier):
        write_report(run)
        told = data_of(run.path / "report.html")
        assert told["run"]["headline"]["measure"] == "accuracy" and told["run"]["remarks"] == []
        assert told["columns"]["columns"]["loss"]


# What continues


def test_grpo_goes_on_from_sft(sft, tiny_model, tmp_path):
    run = train(online(tiny_model, adapter=str(sft.path)), tmp_path / "run")
    for key, value in measures(sft.evaluation()["after"]).items():
        if key not in ("loss", "perplexity"):
            assert run.evaluation()["before"][key] == value, key  # the same model on the same problems
    first, second = run.metrics()
    assert abs(first["kl"]) < 1e-6 < 1e-5 < abs(second["kl"])  # the reference is the SFT model
    assert adapter_config(run)["r"] == RANK and adapter_config(run)["lora_alpha"] == 6
    assert run.recipe_values()["lora"]["r"] == RANK
    start, end = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (sft.path, run.path))
    assert not any(torch.equal(end[name], start[name]) for name in start)
    longer = train(online(tiny_model, adapter=str(sft.path), training={"max_steps": 3}), tmp_path / "run", resume=True)
    assert [row["step"] for row in longer.metrics()] == [1, 2, 3]


def test_sft_goes_on_from_sft(sft, tiny_model, tmp_path):
    names = ["v_proj", "q_proj", "k_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]  # all that there are
    changes = {"lora": {**LORA, "target_modules": names}, "rewards": [], "adapter": str(sft.path)}
    changes["sft"] = {"max_length": 32}
    run = train(tiny_recipe(tiny_model, algorithm="sft", **changes), tmp_path / "run")
    assert run.evaluation()["before"]["loss"] == pytest.approx(sft.evaluation()["after"]["loss"], abs=1e-6)


def test_a_reward_model_goes_on_from_sft_and_from_a_reward_model(sft, reward_model, runs, tiny_model, tmp_path):
    settings = {"training": {"max_steps": 1}}
    run = train(reward_recipe(runs, tiny_model, adapter=str(sft.path), **settings), tmp_path / "from-sft")
    assert run.evaluation()["before"]["loss"] != pytest.approx(reward_model.evaluation()["before"]["loss"], abs=1e-4)
    run = train(reward_recipe(runs, tiny_model, adapter=str(reward_model.path), **settings), tmp_path / "from-reward")
    wanted, found = reward_model.evaluation()["after"], run.evaluation()["before"]
    assert found.keys() == wanted.keys()
    assert measures(found) == pytest.approx(measures(wanted), abs=1e-6)


def test_grpo_is_rewarded_by_a_reward_model(sft, reward_model, tiny_model, tmp_path, monkeypatch):
    scored, score = [], AdapterReward.__call__

    def spy(self, prompt_ids, completion_ids, **columns):
        values = score(self, prompt_ids, completion_ids, **columns)
        scored.extend(zip(prompt_ids, completion_ids, values, strict=True))
        return values

    monkeypatch.setattr(AdapterReward, "__call__", spy)
    rewards = [{"function": "reward_adapter", "name": "liking", "options": {"adapter": str(reward_model.path)}}]
    run = train(online(tiny_model, rewards=rewards, adapter=str(sft.path)), tmp_path / "run")
    assert len(scored) == 4 + 2 * 16 + 4 and len({value for *_, value in scored}) > 20
    values = [value for *_, value in scored]
    means = [run.evaluation()["before"], *run.metrics(), run.evaluation()["after"]]
    for found, part in zip(means, (values[:4], values[4:20], values[20:36], values[36:]), strict=True):
        assert found["reward/liking"] == pytest.approx(sum(part) / len(part), abs=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(tiny_model)
    stock = PeftModel.from_pretrained(stock, reward_model.path / "adapter").get_base_model()
    head = load_file(reward_model.path / "adapter" / "head.safetensors")["weight"][0]
    with torch.no_grad():
        for prompt, completion, value in scored:
            hidden = stock.model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0, -1]
            assert value == pytest.approx(float(hidden @ head), abs=1e-4)


def test_grpo_is_rewarded_by_a_trained_classifier(classifier, tiny_model, tmp_path):
    options = {"model": str(classifier.path / "model"), "label": "b"}
    rewards = [{"function": "classifier", "name": "style", "options": options}]
    run = train(online(tiny_model, rewards=rewards), tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(classifier.path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier.path / "model")
    for sample in run.samples():
        wanted = 0.0
        if sample["completion"].strip():
            with torch.no_grad():
                wanted = float(model(**tokenizer(sample["completion"], return_tensors="pt")).logits.softmax(-1)[0, 1])
        assert sample["rewards"]["style"] == pytest.approx(wanted, abs=1e-6)
    assert run.plan()["rewards"]["style"]["device"] == "cpu"


# The command line


@pytest.fixture
def command(tiny_model: Path, runs: Path, tmp_path: Path, monkeypatch, lowmem_rlhf) -> Callable[..., Any]:
    """Return a function that runs a command on a recipe, made of the tiny one, in the folder of all runs."""
    monkeypatch.chdir(runs)

    def run(first: str, *more: str, **changes: Any) -> Any:
        (tmp_path / "stage.yaml").write_text(yaml.safe_dump(changed(tiny_values(tiny_model), changes)))
        return lowmem_rlhf(first, tmp_path / "stage.yaml", *more)

    return run


def one_message(done: Any) -> str:
    """Return the message of a refused command: one sentence, for a recipe's schema below a line that names it."""
    assert done.code == 2 and done.err.startswith("error: "), done
    assert "Traceback" not in done.err + done.out
    lines = done.err.removeprefix("error: ").strip().split("\n")
    if lines[0].startswith("recipe ") and lines[0].endswith("has an error:"):
        lines = lines[1:]
    assert len(lines) == 1, done.err
    return lines[0].strip()


@pytest.fixture(scope="module")
def everything(runs: Path, sft, reward_model, classifier) -> None:
    """All runs, other data, and adapters that cannot be continued: unfinished, of another base by name, by shape."""
    write_jsonl(runs / "other.jsonl", [{"text": "a b", "label": "c"}] * 4)
    write_jsonl(runs / "plain.jsonl", [{"question": f"{n}+1"} for n in range(20)])
    (runs / "unfinished").mkdir()
    shutil.copy(sft.path / "recipe.yaml", runs / "unfinished")
    config = shutil.copytree(sft.path / "adapter", runs / "foreign") / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/other"}))
    for file in ("base.json", "hashes.json"):  # as of an adapter that was made elsewhere
        (runs / "foreign" / file).unlink()
    name = Path(sft.recipe_values()["model"]).name  # that of the other runs' model, of which it is no copy
    other = save_tiny_model(runs / "wide-model" / name, hidden_size=32)
    settings = {"lora": LORA, "rewards": [], "sft": {"max_length": 32}, "training": {"max_steps": 1}}
    train(tiny_recipe(other, algorithm="sft", **settings), runs / "wide")


CLASSIFIER = {"algorithm": "classifier", "model": "bert", "rewards": [], "data": {**LABELLED, "train": "texts.jsonl"}}
OF_PAIRS = {"algorithm": "reward_model", "rewards": [], "data": {**PLAIN, "train": "pairs.jsonl"}}
OF_PAIRS["reward_model"] = {"max_length": 32}
OF_SFT = {"algorithm": "sft", "sft": {"max_length": 32}}
LIKED = [{"function": "reward_adapter", "name": "liking", "options": {"adapter": "reward"}}]
UNLIKED = [{**LIKED[0], "options": {"adapter": "sft"}}]
STYLED = [{"function": "classifier", "options": {"model": "classifier/model", "label": "c"}}]


@pytest.mark.parametrize(
    ("changes", "overrides", "parts"),
    [
        (OF_PAIRS, ["data.rejected=worse"], ["data.rejected: pairs.jsonl has no column 'worse'", "prompt, chosen, "]),
        (OF_PAIRS, ["data.chosen=choosen"], ["no column 'choosen'; did you mean 'chosen'?"]),
        (OF_PAIRS, ["data.margin=by"], ["data.margin: pairs.jsonl has no column 'by'"]),
        (OF_PAIRS, ["data.rejected=chosen"], ["hold the same answer, from which nothing can be learned"]),
        (
            OF_PAIRS,
            ["reward_model.max_length=4"],
            ["its pair has ", "reward_model.max_length is 4", "data.long_prompts"],
        ),
        (OF_PAIRS, ["rewards=[length]"], ["rewards: reward_model learns from its data alone"]),
        (OF_PAIRS, ["adapter=sft", "lora.r=4"], ["lora.r: got 4, but the adapter that", "(sft) has 3"]),
        (OF_SFT, ["data.answer=null"], ["data.completion: missing; name the column that is learned"]),
        (OF_SFT, ["data.completion=solution"], ["data.completion: arithmetic has no column 'solution'"]),
        (OF_SFT, ["sft.max_length=4"], ["its example has ", "sft.max_length is 4"]),
        (OF_SFT, ["sft.max_length=400"], ["sft.max_length 400 makes 400 tokens", "has only 256 positions; lower it"]),
        (OF_SFT, ["data.text=question"], ["data.template: an example of data.text"]),
        (
            OF_SFT,
            ["data.text=question", "data.template=null"],
            ["data.text: whole texts have no prompt", "remove the rewards"],
        ),
        (
            CLASSIFIER,
            ["data.label=genre"],
            ["data.label: texts.jsonl has no column 'genre'", "its columns: text, label"],
        ),
        (CLASSIFIER, ["data.label=null"], ["data.text, data.label: a classifier needs both"]),
        (CLASSIFIER, ["model=./nowhere"], ["model './nowhere' does not exist"]),
        (CLASSIFIER, ["classifier.max_length=65"], ["max_length: got 65", "reads 3 to 64 tokens"]),
        (CLASSIFIER, ["adapter=sft"], ["adapter: a classifier trains whole and has none"]),
        (CLASSIFIER, ["rewards=[length]"], ["rewards: classifier learns from its data alone"]),
        (CLASSIFIER, ["data.eval=other.jsonl"], ["held-out data: label 'c' is not in the training data (a, b)"]),
        ({"rewards": STYLED}, [], ["rewards: classifier: label: got 'c'", "0 'a', 1 'b'"]),
        ({"rewards": UNLIKED}, [], ["rewards: liking: adapter 'sft' has no score head", "algorithm: reward_model"]),
        ({"rewards": [{"function": "reward_adapter"}]}, [], ["rewards[0].options.adapter: missing"]),
        (
            {"rewards": LIKED, "lora": {"target_modules": ["q_proj", "v_proj"]}},
            ["hardware.quantization=nf4", "hardware.compute_dtype=bfloat16"],
            ["rewards: liking: the adapter in reward", "are not beside the same layers (down_proj, "],
        ),
        ({"adapter": "classifier"}, [], ["adapter 'classifier' is a classifier's run, which has no adapter"]),
        ({"adapter": "sft"}, [], ["lora.r: got 4, but the adapter that the recipe continues from (sft) has 3"]),
        ({"adapter": "sft", "lora": LORA}, ["lora.lora_alpha=8"], ["lora.lora_alpha: got 8", "has 6; leave it out"]),
        (
            {"adapter": "sft", "lora": LORA},
            ["lora.target_modules=[q_proj,v_proj]"],
            ["lora.target_modules: got q_proj, v_proj, but the adapter", "is beside down_proj, gate_proj"],
        ),
        ({"adapter": "./nowhere"}, [], ["adapter './nowhere' does not exist"]),
        ({"adapter": "unfinished"}, [], ["is a run without a finished adapter; let it finish first"]),
        (
            {"adapter": "foreign", "lora": LORA},
            [],
            ["adapter 'foreign' belongs to 'org/other'", "give model=org/other"],
        ),
        (
            {"adapter": "wide", "lora": LORA},
            [],
            ["adapter 'wide' was trained on other weights than the recipe's model has: on 'model"],
        ),
        ({}, ["training.num_train_epochs=2"], ["training.num_train_epochs: is for sft, reward_model and classifier"]),
        ({"algorithm": "ppo"}, ["ppo.critic=reward"], ["ppo.critic: got reward, but no reward of this recipe is a"]),
        ({"rewards": ["gsm8k_answer"]}, ["data.answer=null", "data.train=plain.jsonl"], ["needs a column 'answer'"]),
    ],
)
def test_wrong_input_is_one_sentence_before_anything_is_written(
    command, everything, tmp_path, changes, overrides, parts
):
    done = command("train", "--output", str(tmp_path / "run"), *overrides, **changes)
    message = one_message(done)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def test_a_classifiers_run_cannot_be_resumed(command, classifier):
    done = command("train", "--output", "classifier", "--resume", **CLASSIFIER)
    assert "--resume: a classifier's run cannot be continued; start it anew" in one_message(done)
    again = command("train", "--output", "classifier", **CLASSIFIER)
    assert "already holds a run" in one_message(again)


def test_a_classifier_that_is_interrupted_does_not_promise_to_go_on(command, tmp_path, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_rlhf.algorithms.classifier.update.train_classifier", interrupted)
    done = command("train", "--output", str(tmp_path / "run"), **CLASSIFIER)
    assert done.code == 130 and done.err.startswith("interrupted; a classifier's run cannot be continued")
    assert "--resume" not in done.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["plan"], ["plan", "--json"], ["plan", "--vram", "11GB"], ["train", "--dry-run"]]
)
def test_a_classifier_has_no_plan_and_says_so(command, arguments):
    message = one_message(command(*arguments, **CLASSIFIER))
    assert "a classifier has no plan" in message and "classifier.batch_tokens (4096)" in message


def test_the_last_lines_of_a_run_name_what_it_made(command, tmp_path):
    short = ["training.max_steps=1", "data.eval_size=0"]
    done = command("train", "--output", str(tmp_path / "c"), *short, **CLASSIFIER)
    assert done.code == 0, done.err
    assert done.out.endswith(f"\nmodel:   {tmp_path / 'c' / 'model'}\nreport:  {tmp_path / 'c' / 'report.html'}\n")
    assert (tmp_path / "c" / "model" / "model.safetensors").is_file()
    done = command("train", "--output", str(tmp_path / "s"), *short, "rewards=[]", **OF_SFT)
    assert done.code == 0, done.err
    assert done.out.endswith(f"\nadapter: {tmp_path / 's' / 'adapter'}\nreport:  {tmp_path / 's' / 'report.html'}\n")
    assert (tmp_path / "s" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "sampled"), [(OF_SFT, True), ({**OF_SFT, "rewards": []}, False), (OF_PAIRS, False)]
)
def test_a_plan_of_the_other_stages_is_printed(command, changes, sampled):
    done = command("plan", "--json", **changes)
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["fits"] and ("rollout" in made["memory"]["phases"]) == sampled
