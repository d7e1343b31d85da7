"""A real 135M model learns preferences with TRL's DPO: minutes, so it is marked slow."""

import json
import os
from itertools import pairwise

import pytest
import torch
from trl_cases import write_rows

from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.session.train import train


@pytest.fixture
def all_cores():
    """A real model gains from threads, unlike the tiny ones of the other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


def swapped(lines):
    """Return pairs of a problem's own solution and that of the next problem."""
    rows = [json.loads(line) for line in lines]
    return [
        {"question": row["question"], "chosen": row["answer"], "rejected": other["answer"]}
        for row, other in pairwise(rows)
    ]


@pytest.mark.slow
def test_dpo_prefers_a_problems_own_solution_on_held_out_problems(smollm2, shared, all_cores, tmp_path):
    gsm8k = shared / "data" / "gsm8k"
    files = {}
    for name, count in (("train", 49), ("test", 25)):
        lines = (gsm8k / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        files[name] = write_rows(tmp_path, swapped(lines), f"{name}.jsonl")
    recipe = load_recipe(
        "dpo",
        [
            f"model={smollm2}",
            f"data.train={files['train']}",
            f"data.eval={files['test']}",
            "data.train_size=null",
            "data.eval_size=24",
            "trl.max_length=384",
            "hardware.device=cpu",
            "hardware.quantization=nf4",
            "training.num_train_epochs=1",
            "training.prompts_per_step=6",
            "training.learning_rate=3.0e-4",
            "training.warmup_steps=0",
        ],
    )
    run = train(recipe, tmp_path / "run")
    before, after = (run.evaluation()[when] for when in ("before", "after"))
    assert before["rewards/margins"] == 0 and before["accuracy"] is None
    assert after["loss"] < before["loss"] - 0.02
    assert after["rewards/margins"] > 0.05 and after["accuracy"] >= 0.7
    assert len(run.metrics()) == 8
