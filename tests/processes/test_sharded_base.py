"""A base whose layers the processes share gives the adapter of a base that one process holds."""

import pytest
from test_several_processes import recipe_of, same_runs
from tiny_runs import save_tiny_chat_model

from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("sharded") / "model")


def with_hardware(recipe, **changes):
    return recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=changes)})


@pytest.mark.parametrize("case", ["sft", "sft_one_row", "grpo", "grpo_one_prompt", "ppo", "reward_model", "trl/dpo"])
def test_a_shared_base_gives_the_adapter_of_a_whole_one(two, model, tmp_path, case):
    recipe = recipe_of(model, tmp_path, case)
    alone = train(recipe, tmp_path / "alone")

    assert two.train(with_hardware(recipe, shard_base=True), tmp_path / "two") == [{}, {}]

    same_runs(RunDirectory(tmp_path / "two"), alone)


@pytest.mark.parametrize("case", ["sft", "grpo"])
def test_a_shared_base_in_nf4_gives_the_adapter_of_a_whole_one(two, model, tmp_path, case):
    recipe = with_hardware(recipe_of(model, tmp_path, case), quantization="nf4")
    alone = train(recipe, tmp_path / "alone")

    assert two.train(with_hardware(recipe, shard_base=True), tmp_path / "two") == [{}, {}]

    same_runs(RunDirectory(tmp_path / "two"), alone)
