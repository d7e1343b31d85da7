"""Two processes give the adapter of one: every algorithm, unequal lengths, one with nothing to do, a shared base."""

import pytest
from process_cases import CASES, SLOW, recipe_of, same_runs
from tiny_runs import tiny_recipe

from lowmem_rlhf.run.directory import RunDirectory

# What a process holds of the base's numbers, written into a file.
HELD = """
import os
from pathlib import Path
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.sharded import local_part
begin = SharedBase.__init__
def told(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    frozen = [one for one in self.model.parameters() if not one.requires_grad]
    held, whole = (sum(one.numel() for one in ones) for ones in (map(local_part, frozen), frozen))
    Path({folder!r}, os.environ["RANK"]).write_text(f"{held} {whole}")
SharedBase.__init__, SharedBase.began = told, begin
"""
AS_BEFORE = "from lowmem_rlhf.engine.base import SharedBase; SharedBase.__init__ = SharedBase.began"


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_adapter_of_one(two, alone, tmp_path, case):
    recipe, expected = alone(case)

    assert two.train(recipe, tmp_path / "two") == [{}, {}]

    same_runs(RunDirectory(tmp_path / "two"), expected)


@pytest.mark.parametrize("case", ["sft_one_row", "grpo", "ppo_one_prompt", "reward_model"])
def test_a_shared_base_gives_the_adapter_of_a_whole_one(two, alone, model, tmp_path, case):
    _, expected = alone(case)

    recipe = recipe_of(model, tmp_path, case, shard_base=True, offload_base=case == "reward_model")

    assert two.train(recipe, tmp_path / "two") == [{}, {}]

    same_runs(RunDirectory(tmp_path / "two"), expected)


def test_a_shared_base_in_nf4_lies_in_parts_and_gives_the_adapter_of_a_whole_one(two, alone, model, tmp_path):
    _, expected = alone("grpo", quantization="nf4")
    recipe = recipe_of(model, tmp_path, "grpo", quantization="nf4", shard_base=True)

    two.tell(code=HELD.replace("{folder!r}", repr(str(tmp_path))))
    said = two.train(recipe, tmp_path / "two")
    two.tell(code=AS_BEFORE)

    assert said == [{}, {}]
    same_runs(RunDirectory(tmp_path / "two"), expected)
    layers = sum((64 * 64 + 32 * 64 * 2 + 64 * 64 + 3 * 64 * 128) // 2 for _ in range(2))  # bytes of codes
    for rank in "01":
        held, whole = map(int, (tmp_path / rank).read_text().split())
        assert whole - held == layers // 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"hardware": {"shard_base": True, "quantization": "int8", "compute_dtype": "bfloat16"}},
            "got int8 with hardware.shard_base",
        ),
        ({"hardware": {"device": "cpu:1"}}, "each of which has a card of its own; give cpu"),
        ({"generation": {"engine": "vllm"}}, "2 processes ask one server, which none of them starts"),
    ],
)
def test_what_processes_cannot_do_is_refused(two, model, tmp_path, changes, said):
    first, second = two.train(tiny_recipe(model, training=SLOW, **changes), tmp_path / "run")

    assert said in first["error"]
    assert (first["said_elsewhere"], second["said_elsewhere"]) == (False, True)
