"""Models whose layers differ from one another, and mixtures of experts: what the plan takes them for."""

import json
from dataclasses import replace

import pytest
from planning_cases import GEMMA_4_E2B, card, cpu

from lowmem_rlhf.architecture import counting
from lowmem_rlhf.architecture.catalogue import entries, find
from lowmem_rlhf.architecture.counting import CannotCount
from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.profiles import find_profile
from lowmem_rlhf.planning.memory.resident import Memory, expert_bytes
from lowmem_rlhf.planning.memory.rollout import kv_bytes_per_token
from lowmem_rlhf.planning.plan import make_plan
from lowmem_rlhf.planning.shapes import prompts_shape

pytestmark = pytest.mark.usefixtures("cache", "in_process")
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("as_saved", [False, True], ids=["as published", "as transformers saves it"])
def test_the_layers_of_gemma_4_are_those_of_its_class(as_saved):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**GEMMA_4_E2B, "num_hidden_layers": 10, "num_kv_shared_layers": 4, "num_global_key_value_heads": 2}
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(config).model.layers
    sizes = dimensions_from_config(json.loads(config.to_json_string()) if as_saved else fields, "x").layer_sizes
    assert len(sizes) == len(layers) == 10
    for place, (own, layer) in enumerate(zip(sizes, layers, strict=True)):
        attention = layer.self_attn
        assert own.head_dim * 8 == attention.q_proj.out_features, place
        assert own.intermediate_size == layer.mlp.up_proj.out_features, place
        assert own.reuses_keys is not hasattr(attention, "k_proj"), place
        if not own.reuses_keys:
            assert own.num_kv_heads * own.head_dim == attention.k_proj.out_features, place


def test_keys_that_are_reused_are_cached_once():
    dims = dimensions_from_config(GEMMA_4_E2B, "x")
    own = [one for one in dims.layer_sizes if not one.reuses_keys]
    assert len(own) == 15 and [one.head_dim for one in own].count(512) == 2
    assert kv_bytes_per_token(dims, 2) == sum(2 * 2 * one.head_dim for one in own)


def test_experts_have_terms_of_their_own():
    dims = dimensions_from_config(QWEN3_MOE, "x")
    assert dims.known and not dims.note
    assert (dims.experts.count, dims.experts.per_token, dims.experts.inner, dims.experts.shared) == (128, 8, 768, 0)
    assert dims.expert_parameters == 48 * 128 * 3 * 768 * 2048
    some_dense = dimensions_from_config({**QWEN3_MOE, "mlp_only_layers": [0]}, "x")
    assert some_dense.experts is None and not some_dense.known and "estimated" in some_dense.note


def test_experts_leave_a_card_that_they_do_not_fit_on(recipe):
    loaded = recipe(QWEN3_MOE)
    plan, large = (make_plan(loaded, card(free, bf16=True), "x") for free in (10.75, 23.5))
    dims = dimensions_from_config(QWEN3_MOE, "x")
    assert plan.fits and plan.settings.offload_experts and plan.settings.quantization == "nf4"
    assert "15.19 GiB of host memory" in plan.reasons["offload_experts"]
    # with them away there is room: what else saves memory is not paid for
    assert plan.settings.optim == "adamw" and not plan.settings.offload_embeddings and plan.settings.lora["r"] == 16
    assert plan.memory["host"]["experts"] == expert_bytes(dims) > 15 * 2**30
    assert large.fits and not large.settings.offload_experts and "experts" not in large.memory["host"]
    phases = [made.memory["phases"]["export"]["weights"] for made in (large, plan)]
    one_expert = phases[1] - (phases[0] - expert_bytes(dims))
    assert 0 < one_expert == pytest.approx(3 * 768 * 2048 * 4.5 / 8, rel=0.5)


def test_experts_in_host_memory_where_there_are_none_to_move(recipe):
    with pytest.raises(UserError, match=r"hardware\.offload_experts: .* has no experts; leave it out"):
        make_plan(recipe("Qwen2.5-0.5B", "hardware.offload_experts=true"), card(10.75), "x")
    asked = make_plan(recipe(QWEN3_MOE, "hardware.offload_experts=true"), card(140, bf16=True), "x").settings
    assert asked.quantization == "nf4" and asked.offload_experts
    fast = replace(card(140, bf16=True), speed=find_profile("rtx-4090").speed)
    said = make_plan(recipe(QWEN3_MOE, "hardware.offload_experts=true"), fast, "x").reasons["quantization"]
    assert said.startswith("experts that wait in host memory are in NF4")
    free, pinned = (
        make_plan(recipe(QWEN3_MOE, *more), cpu(200), "x") for more in ((), ("hardware.offload_experts=true",))
    )
    assert pinned.settings == free.settings and pinned.settings.quantization == "none"  # a CPU's are there anyway
    wide = recipe(QWEN3_MOE, "hardware.offload_experts=true", "hardware.quantization=none")
    with pytest.raises(UserError, match=r"only experts in NF4 can wait in host memory, and .* is none; set it to nf4"):
        make_plan(wide, card(100, bf16=True), "x")
    assert not make_plan(recipe(QWEN3_MOE, "hardware.offload_experts=true"), cpu(64), "x").settings.offload_experts


def test_the_mixtures_of_the_catalogue_are_known_but_for_those_that_are_padded():
    mixtures = {name: find(name) for name in entries() if find(name).expert_parameters}
    assert {name for name, dims in mixtures.items() if not dims.known} == {"openai/gpt-oss-20b"}
    assert len(mixtures) >= 4


def test_adapters_of_layers_that_reuse_keys_are_fewer(recipe):
    """The heaviest layers of E2B have neither key nor value products."""
    loaded = recipe(GEMMA_4_E2B)
    dims = dimensions_from_config(GEMMA_4_E2B, "x")
    assert {"q_proj", "k_proj", "v_proj", "per_layer_input_gate"} <= {linear.name for linear in dims.linears}
    settings = make_plan(loaded, card(10.75, bf16=True), "x").settings
    layers = Memory(dims, loaded, settings, card(10.75, bf16=True)).layers(prompts_shape(8, 8))
    assert {one.reuses_keys: one.ranks for one in layers} == {False: 9 * 16, True: 7 * 16}
    assert dims.layer_input == 256
    without = {key: value for key, value in GEMMA_4_E2B.items() if key != "hidden_size_per_layer_input"}
    assert dimensions_from_config(without, "x").layer_input == 256  # the class's default


@pytest.mark.parametrize(
    "changes",
    [
        {"per_layer_config": ["x"]},
        {"per_layer_config": {"0": {"head_dim": "x"}}},
        {"num_kv_shared_layers": "x"},
        {"num_kv_shared_layers": 99},
        {"layer_types": ["full_attention"]},
        {"global_head_dim": "x"},
    ],
)
def test_sizes_of_layers_of_the_wrong_kind_get_a_sentence(changes, monkeypatch):
    monkeypatch.setattr(counting, "_ask", lambda config: counted_once())
    with pytest.raises(UserError, match=r"its config.json has a .*size of its layers that is missing or of the wrong"):
        dimensions_from_config({**GEMMA_4_E2B, **changes}, "x")


def counted_once():
    from lowmem_rlhf.architecture.count_class import count_class

    return json.loads(json.dumps(count_class(GEMMA_4_E2B)))


def test_a_model_whose_class_could_not_be_asked_is_not_known(monkeypatch):
    def fails(config):
        raise CannotCount("torch is not installed")

    monkeypatch.setattr(counting, "_ask", fails)
    dims = dimensions_from_config(GEMMA_4_E2B, "x")
    assert not dims.known and "could not be counted (torch is not installed)" in dims.note


def test_experts_whose_number_is_the_classs_default_are_estimated():
    dims = dimensions_from_config({key: v for key, v in QWEN3_MOE.items() if key != "num_experts_per_tok"}, "x")
    assert dims.experts is None and not dims.known and "estimated" in dims.note
