"""A base whose layers processes share out: what each holds, what every pass gathers, and what cannot be."""

import json
import math
from functools import cache

import pytest
from planning_cases import CONFIGS
from processes_cases import QWEN_14B, dims, named, planned, recipe_of

from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.memory.resident import block_weight_bytes, embedding_bytes, layer_weight_bytes
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.planning.processes.plan import plan_processes
from lowmem_rlhf.planning.processes.request import advice_of, cluster_of, plan_of
from lowmem_rlhf.planning.processes.values import ProcessesPlan
from lowmem_rlhf.planning.run_plan import plan_recipe, running_plan
from lowmem_rlhf.planning.time.estimate import StepTime, device_rates
from lowmem_rlhf.planning.time.links import COLLECTIVE, HOP, Ring


@cache
def shared(*changes: str, count: int = 4) -> ProcessesPlan:
    cards = named(*["rtx-2070"] * count)
    return plan_processes(recipe_of(f"model={QWEN_14B}", "hardware.shard_base=true", *changes), cards)


def test_a_shared_base_is_held_in_parts_and_gathered():
    model = dims(QWEN_14B)
    layers, one_layer = block_weight_bytes(model, "nf4", 2), layer_weight_bytes(model, "nf4", 2)
    assert one_layer == math.ceil(layers / model.num_layers)
    plain = planned(*["rtx-2070"] * 4, changes=(f"model={QWEN_14B}",))
    assert not plain.fits and plain.processes[0].plan.memory["phases"]["update"]["weights"] == layers
    made = shared()
    parts = made.processes[0].plan.memory["phases"]["update"]
    assert made.fits and (parts["weights"], parts["gathered_layers"]) == (math.ceil(layers / 4), 2 * one_layer)
    assert parts["embeddings"] == embedding_bytes(model, 2)
    away = shared("hardware.offload_base=true").processes[0].plan
    assert away.memory["phases"]["update"]["weights"] == 0 and away.memory["host"]["base"] == math.ceil(layers / 4)
    assert away.memory["phases"]["export"]["gathered_layers"] == 2 * one_layer
    settings = made.processes[0].plan.to_dict()["settings"]
    assert (settings["base_shards"], settings["offload_base"]) == (4, False)
    assert set(settings) == set(made.processes[0].plan.reasons) and not settings["keep_graphs"]
    assert Plan.from_dict(json.loads(json.dumps(away.to_dict()))).settings == away.settings
    assert made.alone is None and made.speed_up is None


def test_every_pass_over_a_shared_base_gathers_its_layers():
    model = dims(QWEN_14B)
    made = shared()
    process = made.processes[0]
    recipe, settings = process.recipe, process.plan.settings
    rows, prompt = settings.rollout_batch_size, recipe.data.max_prompt_length
    prefills = math.ceil(2 / max(1, settings.micro_batch_tokens // prompt))
    sampled = prefills + math.ceil(16 / rows) * (recipe.generation.max_completion_length - 1)
    ring = Ring(4, 12e9)
    step = StepTime(model, recipe, settings, process.plan.device, device_rates(process.plan.device), ring)
    passes = step.gathers()
    assert passes["rollout"] == sampled
    assert passes["update"] % 2 == 0 and passes["update"] >= 2  # forward and back
    assert passes["score"] >= 1
    layers = block_weight_bytes(model, "nf4", 2)
    assert made.traffic.layers == round(sum(passes.values()) * layers * 3 / 4)
    gather = layers * 3 / 4 / 12e9 + model.num_layers * (COLLECTIVE + 3 * HOP)
    assert step.gathering == pytest.approx(gather)
    assert made.gathering == pytest.approx(sum(passes.values()) * gather)
    assert process.phases["rollout"] == pytest.approx(passes["rollout"] * gather)  # which takes longer than computing
    away = shared("hardware.offload_base=true").processes[0]
    fetched = StepTime(model, away.recipe, away.plan.settings, away.plan.device, device_rates(away.plan.device), ring)
    assert fetched.gathering == pytest.approx(gather + math.ceil(layers / 4) / 12e9)


def test_who_shares_a_base_takes_part_in_every_pass():
    made = shared("training.prompts_per_step=2")
    assert [one.prompts for one in made.processes] == [1, 1, 0, 0]
    assert made.processes[3].phases["rollout"] == made.processes[0].phases["rollout"] > 0


def test_layers_below_the_first_adapter_are_gathered_once_for_the_update():
    some = shared("lora.layers_to_transform=20-39").processes[0]
    step = StepTime(
        dims(QWEN_14B), some.recipe, some.plan.settings, some.plan.device, device_rates(some.plan.device), Ring(4, 12e9)
    )
    whole = [count for count in range(1, 99) if step.gathers()["update"] == count * 1.5]
    assert whole  # 20 of 40 layers have a pass back


def test_of_unlike_layers_the_largest_is_gathered():
    alike = dimensions_from_config(CONFIGS["Qwen2.5-7B"], "x")
    assert layer_weight_bytes(alike, "none", 2) * alike.num_layers == block_weight_bytes(alike, "none", 2)
    unlike = dims("google/gemma-4-E2B-it")
    layers = [one.intermediate_size for one in unlike.layer_sizes]
    average, one = block_weight_bytes(unlike, "none", 2) / unlike.num_layers, layer_weight_bytes(unlike, "none", 2)
    assert max(layers) > min(layers) and average < one < 2 * average


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("hardware.quantization=int8", "shares out nf4 or none"),
        ("hardware.rollout_weights=dequantized", "take quantized or auto"),
        ("hardware.offload_experts=true", "leave one out"),
    ],
)
def test_what_a_shared_base_cannot_have_is_one_sentence(change, said):
    with pytest.raises(UserError, match=said):
        shared(change, count=2)


def test_a_base_is_shared_among_several_processes_only():
    recipe = recipe_of("hardware.shard_base=true", "hardware.profile=rtx-3090")
    for plan in (plan_recipe, running_plan):
        with pytest.raises(UserError, match=r"hardware.shard_base: got true, but in one process"):
            plan(recipe)
    with pytest.raises(UserError, match=r"hardware.offload_base: got true without shard_base"):
        recipe_of("hardware.offload_base=true")
    with pytest.raises(UserError, match="trl/dpo is not planned with a shared base"):
        plan_processes(recipe_of("hardware.shard_base=true", name="dpo"), named("rtx-3090", "rtx-3090"))


def test_what_does_not_fit_is_said_with_what_helps():
    recipe, cluster = recipe_of(f"model={QWEN_14B}"), cluster_of(4, None, None, "rtx-2070")
    made = plan_of(recipe, cluster)
    said = advice_of(made, recipe, cluster)
    assert "does not fit on GeForce RTX 2070" in said and said.endswith(
        "; or hardware.shard_base=true, with which the cards share the base"
    )
