"""The model card of an export: what stands in it, that it names no folder of this machine, that its command runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import lowmem_rlhf
from lowmem_rlhf.export.card import facts as card_facts
from lowmem_rlhf.export.card.write import write_card
from lowmem_rlhf.export.local_paths import without_folders
from lowmem_rlhf.recipe.loading import load_recipe, validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.evaluations import append_evaluation

PROOF = {"mean_kl": 0.000123456, "top1_agreement": 0.9971, "kept_share": 0.9954, "prompts": 8}
EXPORT = {"format": "merged", "onto": "quantized", "dtype": "float16", "proof": PROOF, "files": ["model.safetensors"]}


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe whose model, data, reward and start lie in a folder."""
    return {
        "name": "sums|tiny",
        "description": "Sums by GRPO.",
        "model": str(folder / "models" / "smol"),
        "adapter": str(folder / "runs" / "sft"),
        "data": {"train": str(folder / "train.jsonl"), "eval": "org/sums", "template": "/no_think {question}"},
        "rewards": [
            {"function": f"{folder / 'my.py'}:exact"},
            {"function": "classifier", "name": "style", "options": {"model": str(folder / "bert"), "label": 0}},
        ],
        **changes,
    }


def make_run(folder: Path, recipe: Recipe, name: str = "run") -> RunDirectory:
    """Return a finished run of three steps."""
    plan = {
        "device": {"name": "RTX 2080 Ti", "total_bytes": 11 * 2**30, "free_bytes": 10 * 2**30},
        "settings": {"quantization": "nf4", "compute_dtype": "float16", "optim": "adamw", "micro_batch_tokens": 2048},
        "reasons": {"quantization": f"fits | and {folder / 'bert'} too", "compute_dtype": "no bf16"},
        "memory": {"peak_bytes": 5 * 2**30, "budget_bytes": 10 * 2**30},
    }
    run = RunDirectory.create(folder / name, recipe, plan, resume=False)
    for step in (1, 2, 3):
        run.log_metrics({"step": step, "reward/mean": step / 4, "time/step": 60.0, "memory/peak_bytes": 3 * 2**30})
    before = {"accuracy": 0.0547, "reward/mean": 0.1, "problems": 128}
    run.write_evaluation({"before": before, "after": {**before, "accuracy": 0.805}})
    return run


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return make_run(tmp_path, validate_recipe(values(tmp_path)))


def written(run: RunDirectory, tmp_path: Path, **changes: Any) -> tuple[str, dict[str, Any], Path]:
    """Return the card's text, its metadata and the folder."""
    folder = tmp_path / "export"
    folder.mkdir(exist_ok=True)
    write_card(folder, run, {**EXPORT, **changes})
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text, ModelCard(text).data.to_dict(), folder


def test_results_have_their_intervals_and_the_best_checkpoint_a_column(run, tmp_path):
    rows = [
        {"step": step, "accuracy": value, "problems": 64, "intervals": {"accuracy": [value - 0.1, value + 0.1]}}
        for step, value in ((0, 0.2), (2, 0.7), (3, 0.5))
    ]
    run.write_evaluation({"before": rows[0], "during": rows[1:2], "after": rows[2], "best": {"step": 2}})
    text, _, _ = written(run, tmp_path, step=2)
    assert "On held-out data (64 problems), before and after training, with 95 % intervals over the problems:" in text
    assert "| held-out | before | best, step 2 | after |" in text
    assert "| accuracy | 0.2 [0.1, 0.3] | 0.7 [0.6, 0.8] | 0.5 [0.4, 0.6] |" in text
    assert "the checkpoint after step 2." in text


def test_the_card_tells_what_was_measured(run, tmp_path):
    text, _, folder = written(run, tmp_path)
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads == [
        *("Use", "Evaluation", "Learning curve", "Proof of the export", "Data", "Plan", "Recipe", "Reproduce"),
    ]
    for part in (
        "| accuracy | 0.0547 | 0.805 |",
        "128 problems",
        "| mean KL to the live policy (nats a token) | 0.000123 |",
        "| same likeliest token | 0.997 |",
        "| share of the change kept | 0.995 |",
        "| prompts | 8 |",
        "3 steps in 3 minutes, peak memory 3.00 GiB",
        "Trained on RTX 2080 Ti, 11.00 GiB, predicted peak 5.00 GiB",
        "| compute_dtype | float16 | no bf16 |",
        "merged, onto the quantized weights, float16",
        "smol (a local copy)",
        "the adapter `sft` of an earlier run",
        "Sums by GRPO.",
    ):
        assert part in text, part
    assert "fits \\| and bert too" in text  # a bar in a cell does not end it
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "](curve.png)" in text


def test_no_folder_of_this_machine_is_in_it(run, tmp_path):
    append_evaluation(
        run.path, {"steps": 3, "data": str(tmp_path / "own.jsonl"), "results": {"policy": {}}, "counts": {}}
    )
    written(run, tmp_path)
    for file in ("README.md", "recipe.yaml"):
        text = (tmp_path / "export" / file).read_text(encoding="utf-8")
        assert str(tmp_path) not in text and str(Path.home()) + "/" not in text and str(Path.cwd()) not in text
        assert "/no_think {question}" in text  # a text that only looks like a path


def test_the_command_trains_what_the_run_trained(run, tmp_path, monkeypatch):
    """Its recipe and overrides give the run's own recipe, with the numbers' precision pinned."""
    text, _, folder = written(run, tmp_path)
    command = re.search(r"^lowmem-rlhf train .*$", text, re.MULTILINE)
    words = shlex.split(command.group())
    assert words[:3] == ["lowmem-rlhf", "train", "recipe.yaml"]
    monkeypatch.chdir(folder)
    places = {"smol": "models/smol", "sft": "runs/sft"}
    overrides = [
        re.sub(r"PATH/TO/([^ ]+)", lambda m: str(tmp_path / places.get(m[1], m[1])), word) for word in words[3:]
    ]
    assert sum("PATH/TO" in word for word in words) == 5
    again = load_recipe(words[2], overrides)
    want = validate_recipe(run.recipe_values()).model_dump()
    for key in ("quantization", "compute_dtype", "optim"):
        want["hardware"][key] = run.plan()["settings"][key]
    assert again.model_dump() == want
    assert "`PATH/TO` stands for" in text


def test_metadata_for_the_hub(run, tmp_path):
    _, data, _ = written(run, tmp_path)
    assert data.pop("model-index")
    assert data == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lowmem-rlhf", "grpo"],
        "datasets": ["org/sums"],
    }


def results(text: str) -> dict[tuple[str, str], Any]:
    """Return the held-out results that the Hub's own reader finds in a card, by data set and metric."""
    return {(one.dataset_type, one.metric_type): one for one in ModelCard(text).data.eval_results or ()}


def test_results_are_metadata_that_the_hub_s_own_reader_takes(run, tmp_path):
    before = {"accuracy": 0.0547, "reward/mean": 0.1, "completion/mean_length": 9.0, "problems": 128}
    after = {**before, "accuracy": 0.805, "intervals": {"accuracy": [0.728, 0.864]}}
    run.write_evaluation({"before": before, "after": after})
    found = results(written(run, tmp_path)[0])
    assert set(found) == {("org/sums", "accuracy"), ("org/sums", "reward/mean")}
    one = found["org/sums", "accuracy"]
    assert (one.metric_value, one.task_type, one.dataset_split) == (0.805, "text-generation", "test")
    assert one.metric_args["interval_95"] == [0.728, 0.864] and one.metric_args["problems"] == 128


def test_results_are_of_the_checkpoint_that_was_exported(run, tmp_path):
    rows = [{"step": step, "accuracy": value} for step, value in ((2, 0.7), (3, 0.5))]
    run.write_evaluation({"during": rows[:1], "after": rows[1]})
    for step, value in ((2, 0.7), (3, 0.5), (None, 0.5)):
        assert results(written(run, tmp_path, step=step)[0])["org/sums", "accuracy"].metric_value == value
    assert "model-index" not in written(run, tmp_path, step=1)[0]  # nothing was measured after that step


def test_results_of_tasks_and_of_later_evaluations_are_told_apart(tmp_path):
    tasks = [
        {"name": "sums", "data": {"train": "arithmetic"}, "rewards": ["exact_match"]},
        {"name": "mine", "data": {"train": str(tmp_path / "mine.jsonl")}, "rewards": ["length"]},
    ]
    tasks[1]["rewards"] = [{"function": "length", "options": {"target": 3}}]
    run = make_run(tmp_path, validate_recipe({"model": "org/base", "tasks": tasks}))
    own = {"sums": {"accuracy": 0.9}, "mine": {"reward/mean": 0.3, "headline": "reward/mean"}}
    run.write_evaluation({"after": {"accuracy": 0.6, "tasks": own}})
    policy = {"arc_easy/acc": {"value": 0.4, "low": 0.3, "high": 0.5}}
    append_evaluation(run.path, {"steps": 3, "data": "lm-eval", "tasks": ["arc_easy"], "results": {"policy": policy}})
    text, _, _ = written(run, tmp_path)
    assert {key: one.metric_value for key, one in results(text).items()} == {
        ("arithmetic", "accuracy"): 0.9,
        ("mine.jsonl", "reward/mean"): 0.3,
        ("arc_easy", "acc"): 0.4,
    }
    assert str(tmp_path) not in text.split("---")[1]


@pytest.mark.parametrize(
    ("kind", "library", "relation", "tags"),
    [
        ("adapter", "peft", "adapter", ["lowmem-rlhf", "sft", "lora"]),
        ("merged", "transformers", "finetune", ["lowmem-rlhf", "sft"]),
        ("gguf", None, "finetune", ["lowmem-rlhf", "sft", "gguf"]),
        ("ollama", None, "finetune", ["lowmem-rlhf", "sft", "gguf"]),
    ],
)
def test_a_hub_base_and_each_format(tmp_path, kind, library, relation, tags):
    changes = {"model": "org/base", "adapter": None, "algorithm": "sft", "rewards": []}
    run = make_run(tmp_path, validate_recipe(values(tmp_path, **changes)))
    text, data, folder = written(run, tmp_path, format=kind)
    assert data["base_model"] == "org/base" and data["base_model_relation"] == relation
    assert data.get("library_name") == library and data["tags"] == tags
    assert "[org/base](https://huggingface.co/org/base)" in text and "local copy" not in text
    if kind == "gguf":
        assert "## Use" not in text
        (folder / "tiny-f16.gguf").touch()
        assert "llama-cli -m tiny-f16.gguf" in written(run, tmp_path, format=kind)[0]
    if kind == "adapter":
        assert 'from_pretrained("org/base")' in text


def test_a_reward_model_is_used_as_a_reward(tmp_path):
    changes = {"algorithm": "reward_model", "rewards": [], "adapter": None}
    run = make_run(tmp_path, validate_recipe(values(tmp_path, **changes)))
    text, data, _ = written(run, tmp_path, format="adapter")
    assert "pipeline_tag" not in data and data["tags"] == ["lowmem-rlhf", "reward-model", "lora"]
    example = yaml.safe_load(re.search(r"```yaml\n(rewards:.*?)```", text, re.DOTALL)[1])
    recipe = validate_recipe({"model": "m", "data": {"train": "arithmetic"}, **example})
    assert recipe.rewards[0].function == "reward_adapter"


def test_the_licence_is_the_base_s_own(tmp_path, smollm2):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    assert card_facts.license_of(str(base)) == "unknown"
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    assert card_facts.license_of(str(base)) == "apache-2.0"
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert card_facts.license_of(str(base)) == "unknown"
    assert card_facts.license_of("org/never-fetched") == "unknown"
    assert card_facts.license_of(str(tmp_path / "gone")) == "unknown"
    assert card_facts.license_of(smollm2) == "apache-2.0"  # the GGUF says so


def test_later_evaluations_of_the_finished_policy_stand_with_their_intervals(run, tmp_path):
    one = {"accuracy": {"value": 0.25, "low": 0.21, "high": 0.29}}
    common = {"data": "arithmetic", "counts": {"problem": 64}, "samples": 8, "temperature": 1.0, "method": "Wilson"}
    for steps, value in ((3, 0.5), (3, 0.75), (2, 0.99)):
        policy = {"accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1}}
        append_evaluation(
            run.path, {**common, "steps": steps, "results": {"reference": one, "policy": policy}, "difference": {}}
        )
    text, _, _ = written(run, tmp_path)
    assert "| accuracy | 0.25 [0.21, 0.29] | 0.75 [0.65, 0.85] |" in text
    assert "64 held-out problems, 8 answers each at temperature 1, policy after 3 steps" in text
    assert "0.99 [" not in text and "0.5 [" not in text


def test_what_is_missing_is_left_out(tmp_path):
    run = RunDirectory.create(tmp_path / "bare", validate_recipe(values(tmp_path)), {}, resume=False)
    folder = tmp_path / "export"
    folder.mkdir()
    write_card(folder, run, {})
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Data", "Recipe", "Reproduce"]
    assert not (folder / "curve.png").exists() and "None" not in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"


def test_versions_are_those_that_are_installed():
    import peft
    import torch

    found = card_facts.versions()
    is_checkout = (Path(lowmem_rlhf.__file__).parents[1] / ".git").exists()
    assert found["torch"] == torch.__version__ and found["peft"] == peft.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+( \([0-9a-f]{7,}(-dirty)?\))?", found["lowmem_rlhf"])
    assert ("(" in found["lowmem_rlhf"]) >= is_checkout


@pytest.mark.parametrize(
    ("text", "last"), [("/a/b/c.py:f", "c.py:f"), ("C:\\me\\data.jsonl", "data.jsonl"), ("~/x/", "x"), ("../y", "y")]
)
def test_paths_of_every_system_are_cut(text, last):
    cleaned, local = without_folders({"data": {"train": text, "system": text}})
    assert cleaned == {"data": {"train": last, "system": text}} and local == {"data.train": text}


def test_relative_paths_and_names_stay():
    kept_values = {"model": "org/name", "adapter": "runs/sft", "data": {"train": "train.jsonl"}, "name": "/x"}
    assert without_folders(kept_values) == (kept_values, {})
