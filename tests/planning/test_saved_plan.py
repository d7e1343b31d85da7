"""A plan.json becomes the plan again: of every shipped recipe, of a card and of a CPU, and of earlier versions."""

import json

import pytest
from planning_cases import cpu

from lowmem_rlhf.planning.plan import Plan, make_plan
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes

PLANNED = [name for name in shipped_recipes() if load_recipe(name).algorithm != "classifier"]


def saved(plan: Plan) -> dict:
    """Return a plan as plan.json holds it."""
    return json.loads(json.dumps(plan.to_dict()))


@pytest.mark.parametrize("profile", ["rtx-2080-ti", "rtx-4090", "t4"])
@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_of_every_recipe_is_read_again(name, profile):
    plan = plan_recipe(load_recipe(name, [f"hardware.profile={profile}"]))
    assert Plan.from_dict(saved(plan)) == plan
    assert Plan.from_dict({**saved(plan), "probe": {"ratio": 1.0}, "rewards": {}}) == plan  # what a run adds


@pytest.fixture(scope="module")
def plan() -> Plan:
    recipe = load_recipe("grpo_gsm8k", ["lora.target_modules=[q_proj,v_proj]", "hardware.gradient_checkpointing=3"])
    return make_plan(recipe, cpu(16), "cpu")


def test_the_plan_of_a_cpu_is_read_again(plan):
    assert plan.settings.lora["target_modules"] == ["q_proj", "v_proj"] and plan.settings.gradient_checkpointing == 3
    assert "process" in plan.memory and Plan.from_dict(saved(plan)) == plan


def test_a_plan_without_the_newer_keys_is_read(plan):
    values = saved(plan)
    for key in ("verdict", "peak_bytes_range"):
        del values[key]
    for key in ("low_bytes", "high_bytes", "process"):
        del values["memory"][key]
    for key in ("offload_checkpoints", "score_batch_tokens", "rollout_weights", "offload_embeddings"):
        del values["settings"][key]
    for key in ("avx512_bf16", "compiler"):
        del values["device"][key]
    read = Plan.from_dict(values)
    assert read.fits is plan.fits and read.verdict == "yes" and read.device == plan.device
    assert read.peak_bytes_range == (plan.memory["peak_bytes"], plan.memory["peak_bytes"])
    settings = read.settings
    assert settings.score_batch_tokens == settings.micro_batch_tokens == plan.settings.micro_batch_tokens
    assert (settings.offload_checkpoints, settings.offload_embeddings) == (False, False)
    assert settings.rollout_weights == "quantized"


def test_what_is_no_plan_is_refused(plan):
    values = saved(plan)
    for broken in (
        {},
        {"settings": {"quantization": "none"}},
        {**values, "settings": []},
        {**values, "settings": {k: v for k, v in values["settings"].items() if k != "compute_dtype"}},
        {**values, "device": {"name": "CPU"}},
    ):
        with pytest.raises(ValueError, match="no plan of a run"):
            Plan.from_dict(broken)
