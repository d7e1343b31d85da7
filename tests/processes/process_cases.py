"""Recipes that one process and several run, and how their runs are compared."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_recipe, write_jsonl

PAIRS = [
    {"prompt": "1+2=", "chosen": "3", "rejected": "77 abcd"},
    {"prompt": "4+4+1+1+1=", "chosen": "11 b", "rejected": "e"},
    {"prompt": "2-1=", "chosen": "1", "rejected": "0"},
    {"prompt": "5+1=", "chosen": "6 cdefgh 6", "rejected": "ef"},
    {"prompt": "b a?", "chosen": "b", "rejected": "44"},
]
HELD_OUT = [{**row, "prompt": f"9{row['prompt']}"} for row in PAIRS[:3]]
SLOW = {"learning_rate": 1e-3, "max_steps": 5, "save_steps": 2}
ONE_PROMPT = {**SLOW, "prompts_per_step": 1}  # its group is sampled by one process, and the other has none
PPO = {"algorithm": "ppo", "grpo": {}, "ppo": {"num_ppo_epochs": 2, "num_mini_batches": 2}}
CASES = {
    "grpo": {},
    "grpo_one_prompt": {"training": ONE_PROMPT},
    "grpo_normalized": {
        "rewards": [
            {"function": "length", "options": {"target": 12}, "normalize": "batch"},
            {"function": "arithmetic_answer"},
        ],
        "grpo": {"num_iterations": 2, "top_entropy_quantile": 0.5, "beta": 0.0},
    },
    "ppo": PPO,
    "ppo_one_prompt": {**PPO, "training": ONE_PROMPT},
    "rloo": {"algorithm": "rloo", "grpo": {}},
    "sft": {"algorithm": "sft"},
    "sft_one_row": {"algorithm": "sft", "training": ONE_PROMPT},
    "reward_model": {"algorithm": "reward_model"},
    "trl/dpo": {"algorithm": "trl/dpo"},
    "dpo_one_pair": {"algorithm": "trl/dpo", "training": ONE_PROMPT},
}


def recipe_of(model, tmp_path, case, **hardware):
    sections = {"training": SLOW, **CASES[case], "hardware": hardware}
    algorithm = sections.get("algorithm", "grpo")
    if algorithm in ("sft", "reward_model", "trl/dpo"):
        file = str(write_jsonl(tmp_path / "rows.jsonl", PAIRS))
        held_out = str(write_jsonl(tmp_path / "eval.jsonl", HELD_OUT))
        pairs = {"chosen": "chosen", "rejected": "rejected"}
        columns = {"prompt": "prompt", "completion": "chosen"} if algorithm == "sft" else pairs
        data = {"train": file, "eval": held_out, "eval_size": 3, "train_size": None, "template": "{prompt}", **columns}
        limit = {algorithm.partition("/")[0]: {"max_length": 32}}
        sections |= {"data": data, "rewards": [], "grpo": {}, **limit}
    return tiny_recipe(model, **sections)


def adapter(path):
    return load_file(path / "adapter" / "adapter_model.safetensors")


def numbers(row):
    """Return the finite numbers of a row but those of the machine; tokens that are fed hold a prompt in both parts."""
    own = {k: v for k, v in row.items() if isinstance(v, float) and not k.startswith(("time/", "memory/"))}
    return {k: v for k, v in own.items() if v == v}


def same_runs(run, alone):
    """Hold a run of two processes against that of one."""
    expected, got = adapter(alone.path), adapter(run.path)
    assert set(got) == set(expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
    for theirs, ours in zip(alone.metrics(), run.metrics(), strict=True):
        assert ours.keys() == theirs.keys()
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-3, abs=1e-4)
    assert run.evaluation().keys() == alone.evaluation().keys()
    for when, row in alone.evaluation().items():
        assert numbers(run.evaluation()[when]) == pytest.approx(numbers(row), rel=1e-3, abs=1e-4)
    assert [one["completion"] for one in run.samples()] == [one["completion"] for one in alone.samples()]
