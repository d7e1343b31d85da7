"""The memory model: its parts by hand, against public measurements, and against what autograd keeps."""

from dataclasses import replace

import pytest
from planning_cases import CONFIGS, card, cpu

from lowmem_rlhf.planning import memory
from lowmem_rlhf.planning.dimensions import ModelDimensions, dimensions_from_config
from lowmem_rlhf.planning.memory import MIB, Settings
from lowmem_rlhf.recipe import load_recipe

LORA = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}
SETTINGS = Settings("nf4", "float16", True, False, 4096, 64, "quantized", 64, "adamw", LORA)


def dims(name: str) -> ModelDimensions:
    return dimensions_from_config(CONFIGS[name], name)


def test_weights_by_hand():
    model = dims("Qwen2.5-0.5B")
    assert memory.block_weight_bytes(model, "none", 2) == 2 * model.linear_parameters
    assert memory.block_weight_bytes(model, "nf4", 2) / model.linear_parameters == pytest.approx(
        0.5 + 0.127 / 8, abs=1e-4
    )
    assert 1 < memory.block_weight_bytes(model, "int8", 2) / model.linear_parameters < 1.005
    assert memory.embedding_bytes(model, 2) == pytest.approx(151936 * 896 * 2, rel=0.002)  # tied: once
    assert memory.embedding_bytes(dims("Qwen2.5-7B"), 2) / 2**30 == pytest.approx(2.03, abs=0.01)


def test_an_adapter_parameter_takes_sixteen_bytes_with_adamw():
    masters = memory.adapter_bytes(1000, 4)
    assert masters + 4 * 1000 + memory.optimizer_state_bytes(1000, "adamw") == 16_000
    assert masters + 4 * 1000 + memory.optimizer_state_bytes(1000, "adamw_8bit") == pytest.approx(10_000, rel=0.005)


def test_the_cache_holds_prompts_once():
    model = dims("Qwen2.5-1.5B")
    assert memory.kv_bytes_per_token(model, 2) == 2 * 28 * 2 * 128 * 2
    assert memory.kv_cache_bytes(model, 8 * 512, 64 * 256, 2) == 2 * 28 * 2 * 128 * 2 * (8 * 512 + 64 * 256)
    assert memory.kv_cache_bytes(model, 0, 64 * 768, 2) / 2**30 == pytest.approx(1.3, abs=0.05)  # published


# bytes of the loaded model and of the peak as allocated (MiB), from public measurements on a Tesla T4: NF4, stock
# transformers and peft with LoRA r on q, k, v, o, full logits, checkpoints and logits in fp32, SDPA
T4 = [
    ("Qwen2.5-1.5B", 32, 2048, 1641.99, 6827.67),
    ("SmolLM2-135M", 32, 4096, 179.30, 3576.75),
    ("TinyLlama-1.1B", 32, 2048, 1077.55, 2531.58),
    ("TinyLlama-1.1B", 32, 4096, 1073.55, 3895.87),
]


@pytest.mark.parametrize(("name", "r", "tokens", "loaded", "peak"), T4)
def test_checkpointed_terms_against_public_measurements(name, r, tokens, loaded, peak):
    model = dims(name)
    adapters = 8 * model.lora_parameters(r, ["q_proj", "k_proj", "v_proj", "o_proj"])  # weights and gradients
    stored = memory.stored_activation_bytes(model, tokens, 4, checkpointing=True)
    logits = 4 * 4 * tokens * model.vocab_size  # four fp32 copies; more than a layer, so it is the hump
    assert logits > memory.layer_activation_bytes(model, tokens, 2)
    assert (loaded * MIB + adapters + stored + logits) / (peak * MIB) == pytest.approx(1, abs=0.02)


def test_stored_activations_by_hand():
    model = dims("Qwen2.5-0.5B")
    hidden, layer = 2 * 1000 * 896, memory.layer_activation_bytes(model, 1000, 2)

    def stored(checkpointing: bool | int, offload: bool = False) -> int:
        return memory.stored_activation_bytes(model, 1000, 2, checkpointing, offload)

    assert stored(True) == stored(24) == 26 * hidden
    assert stored(False) == stored(0) == 2 * hidden + 24 * layer
    assert stored(1) == 3 * hidden + 23 * layer
    assert stored(True, offload=True) == 2 * hidden
    assert stored(20, offload=True) == 2 * hidden + 4 * layer


def test_a_recomputed_layer_is_no_peak_of_its_own_while_another_keeps_its_activations():
    model, recipe = dims("Qwen2.5-0.5B"), load_recipe("grpo_gsm8k")

    def update(checkpointing: bool | int) -> memory.Components:
        return memory.phases(model, recipe, replace(SETTINGS, gradient_checkpointing=checkpointing), cpu(11))["update"]

    assert update(True) == update(24) and update(True)["layer_activations"] > 0
    assert "layer_activations" not in update(23) and "logits_tile" in update(23)
    sizes = [sum(update(count).values()) for count in range(25)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_layer_keeps_no_more_than_predicted():
    """Tensors that autograd keeps for one more layer of a packed pass, counted by storage."""
    torch = pytest.importorskip("torch")
    base = pytest.importorskip("lowmem_rlhf.model.base")
    packing = pytest.importorskip("lowmem_rlhf.model.packing")
    attention = pytest.importorskip("lowmem_rlhf.model.attention")
    from transformers import AutoConfig, AutoModelForCausalLM

    assert packing.ATTENDED_PER_TOKEN == memory.ATTENDED_PER_TOKEN
    fields = {key: value for key, value in CONFIGS["SmolLM2-135M"].items() if key != "model_type"} | {"vocab_size": 512}
    groups = [packing.Group([1] * 64, [[2] * 33 for _ in range(4)], [0, 1, 2, 3])]

    def kept(layers: int) -> tuple[int, int]:
        config = AutoConfig.for_model("llama", **{**fields, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        shared = base.SharedBase(model.requires_grad_(False), None, "tiny")
        batch = packing.pack(groups, torch.device("cpu"))
        weights = {parameter.untyped_storage().data_ptr() for parameter in shared.parameters()}
        found = {}

        def remember(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage
            return tensor

        context = attention.PackedContext(batch.buckets, torch.device("cpu"))
        with shared.role("policy"), torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            hidden = shared.hidden_states(batch.input_ids, batch.position_ids, context)
        assert hidden.requires_grad
        copies = sum(2 * parameter.numel() for parameter in shared.trainable().values())
        return sum(storage.nbytes() for storage in found.values()) - copies, batch.input_ids.shape[1]

    (one, tokens), (two, _) = kept(1), kept(2)
    predicted = memory.layer_activation_bytes(dims("SmolLM2-135M"), tokens, 2)
    assert 0.45 * predicted < two - one <= predicted


def test_phases_are_integers_and_sum_up():
    model, recipe = dims("Qwen2.5-0.5B"), load_recipe("grpo_gsm8k")
    on_card = memory.phases(model, recipe, SETTINGS, card(11))
    assert list(on_card) == ["rollout", "scoring", "update", "optimizer", "export"]
    assert all(type(size) is int and size >= 0 for phase in on_card.values() for size in phase.values())
    name, peak = memory.peak_phase(on_card)
    assert peak == sum(on_card[name].values()) == max(sum(phase.values()) for phase in on_card.values())
    assert all(phase["allocator"] == 0 for phase in memory.phases(model, recipe, SETTINGS, cpu(11)).values())


def test_evaluation_rows_have_prompts_of_their_own():
    recipe = load_recipe("grpo_gsm8k", ["data.eval_size=0"])
    assert memory.prompts_at_once(recipe, 64) == 8
    assert memory.prompts_at_once(load_recipe("grpo_gsm8k"), 64) == 64
    assert memory.prompts_at_once(recipe, 12) == 1  # waves are of whole groups
    assert memory.prompts_at_once(recipe, 1) == 1
