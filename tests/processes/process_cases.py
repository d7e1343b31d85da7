"""Recipes that one process and several run, and how their runs are compared."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_recipe, tiny_values, write_jsonl

from lowmem_rlhf.recipe.loading import validate_recipe

PAIRS = [
    {"prompt": "1+2=", "chosen": "3", "rejected": "77 abcd"},
    {"prompt": "4+4+1+1+1=", "chosen": "11 b", "rejected": "e"},
    {"prompt": "2-1=", "chosen": "1", "rejected": "0"},
    {"prompt": "5+1=", "chosen": "6 cdefgh 6", "rejected": "ef"},
    {"prompt": "b a?", "chosen": "b", "rejected": "44"},
]
COLORS = [{"ask": f"{a}{b}", "color": a} for a in "abc" for b in "0123456789"]
MACHINE = ("time/", "memory/", "tokens/trained")
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
    "replaced_groups": {"grpo": {"max_generation_batches": 3, "set_aside_steps": 2, "beta": 0.0}},
    "reward_adapter": {},  # of the case reward_model, which passes over the base beside the policy
    "tasks": {},
}


def recipe_of(model, tmp_path, case, judge=None, **hardware):
    """Return the recipe of a case.

    Args:
        judge: a run of the case reward_model, which judges; None: the recipe's own reward does.
    """
    sections = {"training": SLOW, **CASES[case], "hardware": hardware}
    if judge is not None:
        sections["rewards"] = [{"function": "reward_adapter", "options": {"adapter": str(judge)}}]
    if case == "tasks":  # answers of unlike lengths, and other rewards
        values = {**tiny_values(model), "training": {**tiny_values(model)["training"], **SLOW}}
        values["data"] = {"eval_size": 4, "max_prompt_length": 16, "chat": False}
        colors = {"train": str(write_jsonl(tmp_path / "colors.jsonl", COLORS)), "prompt": "ask", "answer": None}
        values["tasks"] = [
            {"name": "sums", "weight": 2, "data": {"train": "arithmetic", "train_size": 16, "template": "{question}="}},
            {
                "name": "colors",
                "data": {**colors, "eval_size": 3},
                "rewards": [{"function": "length", "options": {"target": 5}, "normalize": "batch"}],
                "generation": {"max_completion_length": 5},
            },
        ]
        return validate_recipe(values)
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
    """Return the finite numbers in a row but those of the machine; tokens that are fed hold a prompt in both parts."""
    found = {}
    for key, value in row.items():
        if isinstance(value, dict | list):
            inside = value if isinstance(value, dict) else dict(enumerate(value))
            found |= {f"{key}/{name}": number for name, number in numbers(inside).items()}
        elif isinstance(value, int | float) and value == value:
            found[str(key)] = float(value)
    return {key: value for key, value in found.items() if not key.startswith(MACHINE)}


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
    for theirs, ours in zip(alone.samples(), run.samples(), strict=True):
        assert ours["completion"] == theirs["completion"]
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-3, abs=1e-4)
