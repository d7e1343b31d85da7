"""Every shipped recipe runs: the same file with a tiny model, tiny data and two steps, stages after one another."""

import json
from pathlib import Path

import pytest
from tiny_classifiers import save_sentence_encoder
from tiny_runs import save_tiny_model, write_jsonl
from vllm_standin import StandIn, served_base

from lowmem_rlhf.recipe.loading import Recipe, load_recipe, shipped_recipes
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train

BEFORE = {  # what a recipe goes on from
    "ppo_gpt2_gsm8k": "sft_gpt2_gsm8k",
    "sft_then_grpo": "sft_qwen_gsm8k",
    "style_ppo": "style_classifier",
    "style_grpo": "style_classifier",
    "ppo_reward_adapter": "reward_model",
    "multi_task": "style_classifier",
}
ROWS = [
    {"question": f"{a}+{b}=?", "answer": f"{a}+{b} #### {a + b}", "prompt": f"{a}+{b}=", "chosen": f"{a + b}"}
    | {"rejected": "abc", "text": f"{a} + {b} = {a + b} . {'a b' if a % 2 else 'c d'}", "label": a % 2}
    for a in range(10)
    for b in range(4)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models and the data; the runs of earlier recipes go there too."""
    folder = tmp_path_factory.mktemp("recipes")
    save_tiny_model(folder / "gpt")
    save_sentence_encoder(folder / "encoder", max_seq_length=48)
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


def overrides(name: str, place: Path) -> list[str]:
    """Return what makes a shipped recipe tiny."""
    recipe = load_recipe(name)
    model = place / ("encoder" if recipe.algorithm == "classifier" else "gpt")
    found = [
        f"model={model}",
        "hardware={device: cpu, quantization: none, compute_dtype: float32}",
        f"data.train={place / 'rows.jsonl'}",
        "data.options={}",
        "data.config=null",
        "data.chat=false",
        "data.system=null",
        "data.train_size=24",
        "data.eval_size=4",
        "data.max_prompt_length=48",
        "data.long_prompts=error",
        "generation.max_completion_length=8",
        "sft.max_length=96",
        "reward_model.max_length=48",
        "training.max_steps=2",
        "training.prompts_per_step=4",
        "training.warmup_steps=0",
    ]
    if recipe.algorithm in ("sft", "reward_model", "classifier"):
        found += ["training.num_train_epochs=1", "data.train_size=8"]
    if recipe.data.template:
        found.append("data.max_prompt_length=96")
    if recipe.data.messages:  # the tiny model has no chat template
        found += ["data.messages=null", "data.prompt=question", "data.answer=answer", "data.chat_template_kwargs={}"]
    if recipe.trl:
        found.append("trl.max_length=48")
    if recipe.adapter:
        found.append(f"adapter={place / BEFORE[name]}")
    if recipe.tasks:
        return found[:2] + task_overrides(recipe, place)
    for number, reward in enumerate(recipe.rewards):
        options = dict(reward.options)
        if reward.function == "similarity":
            options["model"] = str(place / "encoder")
        elif reward.function == "classifier":
            options["model"] = str(place / BEFORE[name] / "model")
        elif reward.function == "reward_adapter":
            options["adapter"] = str(place / BEFORE[name])
        elif reward.function == "arithmetic_answer":  # the quickstart's own data is generated
            found = [item for item in found if not item.startswith(("data.train=", "data.options"))]
            found[1:1] = ["data.train=arithmetic"]
        found.append(f"rewards[{number}].options={json.dumps(options)}")
    return found


def task_overrides(recipe: Recipe, place: Path) -> list[str]:
    """Return what makes a recipe of several tasks tiny."""
    found = [
        "training={max_steps: 2, prompts_per_step: 4, warmup_steps: 0}",
        "data={eval_size: 4, chat: false, max_prompt_length: 200}",
    ]
    found.append("generation.max_completion_length=8")
    for number, (name, own) in enumerate(recipe.by_task.items()):
        key = f"tasks[{number}]"
        source = own.data.train if own.data.train == "arithmetic" else place / "rows.jsonl"
        found += [f"{key}.data.train={source}", f"{key}.data.config=null", f"{key}.generation.max_completion_length=8"]
        if name == "style":
            judge = json.dumps({"model": str(place / BEFORE["multi_task"] / "model"), "label": "1"})
            found += [f"{key}.data.train_size=24", f"{key}.rewards[0].options={judge}"]
    return found


def run_of(name: str, place: Path) -> RunDirectory:
    """Return the tiny run of a recipe, run once, after the one that it goes on from."""
    if name in BEFORE:
        run_of(BEFORE[name], place)
    if (place / name / "report.html").is_file():
        return RunDirectory(place / name)
    given = overrides(name, place)
    if (server := load_recipe(name).generation.server) is None:
        return train(load_recipe(name, given), place / name)
    own = [*given, "lora.r=8", "generation.engine=auto", "generation.server=null"]
    with StandIn(served_base(load_recipe(name, own)), str(place / "gpt")).serving() as one:
        found = json.dumps({"url": one.url, "sleep": server.sleep, "devices": None})
        return train(load_recipe(name, [*given, "lora.r=8", f"generation.server={found}"]), place / name)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_runs(name, place):
    run, recipe = run_of(name, place), load_recipe(name)
    rows = run.metrics()
    assert len(rows) >= 2 and all(isinstance(row["loss"], float) for row in rows)
    assert run.recipe_values()["algorithm"] == recipe.algorithm
    assert "after" in run.evaluation()
    made = "model/model.safetensors" if recipe.algorithm == "classifier" else "adapter/adapter_model.safetensors"
    assert (run.path / made).is_file() and (run.path / "report.html").is_file()
    if recipe.algorithm == "ppo":
        assert (run.path / "adapter" / "critic" / "head.safetensors").is_file()
        assert all(row["policy/approx_kl_first"] < 1e-9 for row in rows)
    if recipe.adapter:  # at first the policy is the model that it goes on from
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
