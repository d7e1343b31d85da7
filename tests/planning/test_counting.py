"""Models of types that have no terms here: counted on their real class, remembered, planned with what was counted."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from planning_cases import GEMMA_4_E2B, card, cpu
from tiny_models import RECURRENT, UNPACKABLE, tiny_config

from lowmem_rlhf.architecture import counting
from lowmem_rlhf.architecture.counting import CannotCount
from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.engine.lora import lora_config
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.fits import fit, one_card, what_fits
from lowmem_rlhf.planning.memory.resident import block_weight_bytes, embedding_bytes
from lowmem_rlhf.planning.plan import make_plan
from lowmem_rlhf.recipe.lora_shape import LoraShape
from lowmem_rlhf.report.fits_view import cell_text

pytestmark = pytest.mark.usefixtures("cache")
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
PER_LAYER = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
# model type -> what differs from TINY
UNKNOWN: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "bloom": {"n_head": 4, "n_layer": 2},
    "exaone4": {},
    "falcon": {},
    "gemma4_text": {"head_dim": 16, "global_head_dim": 32, "sliding_window": 8, **PER_LAYER, **SHARED},
    "glm4": {"head_dim": 16},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "helium": {"head_dim": 16},
    "minicpm3": {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "modernbert-decoder": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "nemotron": {"head_dim": 16},
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"]},
    "seed_oss": {"head_dim": 16},
    "stablelm": {},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
}


def config_of(model_type: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**TINY, **UNKNOWN[model_type]})


def fields_of(config: Any, model_type: str) -> dict[str, Any]:
    """Return a config as its config.json says it."""
    return {**json.loads(config.to_json_string(use_diff=True)), "model_type": model_type}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_the_count_is_that_of_the_real_model(model_type, in_process):
    """Parameters, what bitsandbytes quantizes, and the adapters that peft makes."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    from lowmem_rlhf.engine.load import quantization_settings

    config = config_of(model_type)
    dims = dimensions_from_config(fields_of(config, model_type), model_type)
    with torch.device("meta"):
        stock, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
        quantized = replace_with_bnb_linear(
            other,
            modules_to_not_convert=get_keys_to_not_convert(other),
            quantization_config=quantization_settings("nf4", torch.bfloat16),
        )
        adapted = get_peft_model(stock, lora_config(LoraShape(4, 8), "x", stock))
    total = sum(p.numel() for p in stock.parameters() if not p.requires_grad)
    four_bit = [m for m in quantized.modules() if type(m).__name__ == "Linear4bit"]
    assert dims.counted is not None and dims.num_parameters == dims.counted.total == total
    assert dims.linear_parameters == sum(m.in_features * m.out_features for m in four_bit)
    assert dims.lora_parameters(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    upper = LoraShape.of(4, layers_to_transform=[1], rank_pattern={r"layers?\.1\..*|h\.1\..*|blocks\.1\..*": 2})
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(stock, lora_config(upper, "x", stock))
    assert dims.adapted(upper).parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert block_weight_bytes(dims, "none", 2) + embedding_bytes(dims, 2) == 2 * total
    if not dims.known:
        assert f"{model_type!r} is not known here" in dims.note and "counted from its class" in dims.note


def test_what_a_layer_is_made_of_comes_from_the_class(in_process):
    """Names of other kinds, and sizes that no field tells."""
    bloom, mpt, falcon, glm = (
        dimensions_from_config(fields_of(config_of(one), one), one) for one in ("bloom", "mpt", "falcon", "glm4")
    )
    assert [x.name for x in bloom.linears] == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    assert (bloom.intermediate_size, bloom.gated, bloom.num_kv_heads) == (256, False, 4)
    assert (mpt.hidden_size, mpt.num_layers, mpt.num_heads, mpt.intermediate_size) == (64, 2, 4, 256)
    assert (falcon.num_heads, falcon.num_kv_heads, falcon.head_dim) == (4, 1, 16)  # multi_query
    assert (glm.gated, glm.intermediate_size, glm.num_kv_heads) == (True, 96, 2)  # gate and up in one
    with pytest.raises(UserError, match=r"linear layers of a bloom block are query_key_value, dense.*did you mean"):
        bloom.lora_parameters(4, ["query_key_values"])


def test_layers_that_bitsandbytes_leaves_alone_stay_16_bit(in_process):
    """Falcon's linear layers are of a class of their own, which takes adapters but is not quantized."""
    dims = dimensions_from_config(fields_of(config_of("falcon"), "falcon"), "falcon")
    assert dims.linear_parameters == 0 and dims.lora_parameters(4) > 0
    assert block_weight_bytes(dims, "nf4", 2) + embedding_bytes(dims, 2) == 2 * dims.num_parameters


@pytest.mark.parametrize("family", [name for name in (*RECURRENT, *UNPACKABLE) if name not in ("gpt_oss", "mamba")])
def test_tiny_models_of_other_kinds_are_counted(family, in_process):
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dims = dimensions_from_config(fields_of(config, config.model_type), family)
    assert dims.num_parameters == sum(p.numel() for p in model.parameters())


def test_gemma_4_e2b_is_planned_with_all_of_its_weights(in_process, recipe):
    """4.62 billion parameters, of which 2.35 are embeddings of layers: those lie in the host's memory."""
    loaded = recipe(GEMMA_4_E2B)
    plan = make_plan(loaded, card(10.75, bf16=True), "x")
    dims = model_dimensions(loaded.model)
    held = [plan.memory["phases"]["export"][key] for key in ("weights", "embeddings")]
    assert dims.num_parameters == 4_621_490_944
    assert plan.settings.quantization != "none" and plan.verdict == "yes"
    assert dims.counted is not None and dims.counted.tables == 2_348_810_240
    on_the_card = dims.num_parameters - dims.counted.tables
    assert sum(held) > 2 * (on_the_card - dims.linear_parameters) + dims.linear_parameters / 2 > 1.6 * 2**30
    assert plan.peak_bytes_range[0] > sum(held) and plan.peak_bytes_range[1] > plan.memory["peak_bytes"]
    small = make_plan(loaded, card(1.5, bf16=True), "x")
    assert small.verdict == "no" and not small.fits  # the weights alone
    wide = recipe(GEMMA_4_E2B, "hardware.quantization=none")
    assert make_plan(wide, card(4, bf16=True), "x").verdict == "no"


def test_the_verdict_of_a_known_model_is_whether_it_fits(recipe):
    for free, verdict in ((10.75, "yes"), (0.3, "no")):
        plan = make_plan(recipe("Qwen2.5-0.5B"), card(free), "x")
        assert plan.verdict == verdict and plan.fits == (verdict == "yes")
        assert plan.peak_bytes_range == (plan.memory["low_bytes"], plan.memory["high_bytes"])
        assert plan.to_dict()["verdict"] == verdict
        assert plan.to_dict()["peak_bytes_range"] == list(plan.peak_bytes_range)


def test_without_torch_the_verdict_is_unknown_and_says_why(monkeypatch, recipe):
    find = counting.importlib.util.find_spec
    monkeypatch.setattr(counting.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    loaded = recipe({**TINY, "model_type": "stablelm"})
    plan = make_plan(loaded, card(10.75), "x")
    assert plan.verdict == "unknown" and plan.fits
    assert "could not be counted (torch is not installed)" in plan.reasons["quantization"]
    assert make_plan(loaded, card(0.0001), "x").verdict == "no"
    with pytest.raises(UserError, match="'mpt' is not known here, and its parameters could not be counted: torch is"):
        model_dimensions(recipe({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2}).model)


def test_tables_mark_what_is_only_estimated(in_process, recipe):
    loaded = recipe({**TINY, "model_type": "stablelm"}, "data.eval_size=0")
    dims = model_dimensions(loaded.model)
    assert cell_text(fit(loaded, card(10.75), dims)).startswith("? 16-bit ")
    known = model_dimensions(recipe("Qwen2.5-0.5B").model)
    assert cell_text(fit(loaded, card(10.75), known)).startswith("16-bit ")
    cells = what_fits(loaded, one_card(card(10.75), "x"), {"tiny": dims}).to_dict()["tables"]["grpo"]["cells"]
    assert cells["tiny"]["x"]["verdict"] == "unknown" and cells["tiny"]["x"]["fits"] is True


def test_a_class_is_counted_once(cache, in_process):
    config = {**TINY, "model_type": "stablelm"}
    first = dimensions_from_config(config, "x")
    counting._of.cache_clear()  # as another process
    assert dimensions_from_config(dict(reversed(config.items())), "x") == first
    assert len(in_process) == 1 and len(list(cache.iterdir())) == 1
    dimensions_from_config({**config, "num_hidden_layers": 3}, "x")
    assert len(in_process) == 2
    next(cache.iterdir()).write_text("{")  # damaged
    counting._of.cache_clear()
    assert dimensions_from_config(config, "x") == first


def test_a_count_in_a_process_of_its_own(cache, folder):
    """As `plan` does it: this process imports neither torch nor transformers, and the second one counts nothing."""
    model = folder(fields_of(config_of("glm4"), "glm4"))
    code = (
        "import subprocess, sys\n"
        "from lowmem_rlhf.architecture import counting\n"
        "from lowmem_rlhf.architecture.lookup import model_dimensions\n"
        "if sys.argv[2] == 'second': counting._ask = None\n"
        "print(model_dimensions(sys.argv[1]).num_parameters)\n"
        "print([name for name in ('torch', 'transformers', 'bitsandbytes') if name in sys.modules])\n"
    )
    expected = None
    for turn in ("first", "second"):
        done = subprocess.run([sys.executable, "-c", code, model, turn], capture_output=True, text=True, check=True)
        parameters, heavy = done.stdout.split("\n")[:2]
        expected = expected or parameters
        assert heavy == "[]" and parameters == expected and int(parameters) > 0


def test_a_class_that_cannot_be_built_is_told(monkeypatch):
    """The program's own last line, from a type that transformers lacks and from a config that the class refuses."""
    for config, said in (
        ({**TINY, "model_type": "brandnew"}, "transformers has no class for it"),
        ({**TINY, "model_type": "dots1"}, "its class in transformers refuses this config: "),
    ):
        with pytest.raises(CannotCount, match=said):
            counting.count(config)
    monkeypatch.setattr(counting, "TIMEOUT_S", 0.01)
    with pytest.raises(CannotCount, match=r"timed out after 0\.01 seconds"):
        counting.count({**TINY, "model_type": "arcee"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "dbrx", "d_model": 64, "ffn_config": {"moe_num_experts": 4}},
            "experts .moe_num_experts 4. whose parameters",
        ),
        ({**TINY, "model_type": "camembert"}, r"encoder \(camembert\): its attention sees"),
        ({"model_type": "pixtral2", "text_config": GEMMA_4_E2B}, "pixtral2.*inside a larger one"),
        ({**TINY, "model_type": "moshi", "audio_encoder_config": {}}, "takes sound as well"),
        ({"model_type": "blt", "vocab_size": 260}, "neither its config.json nor its class tells num_hidden_layers"),
    ],
)
def test_a_refusal_says_what_is_true(config, message, in_process):
    with pytest.raises(UserError, match=message):
        dimensions_from_config(config, "x")


def test_a_model_whose_config_names_experts_that_it_does_not_have(in_process):
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "head_dim": 16}
    layers = {"layers_block_type": ["mamba", "attention", "mlp"], "n_routed_experts": 8}
    config = {**TINY, **mamba, **layers, "model_type": "nemotron_h"}
    config.pop("num_hidden_layers")
    dims = dimensions_from_config(config, "x")
    assert dims.counted is not None and dims.counted.stacked == 0 and dims.num_layers == 3
    with_experts = dimensions_from_config({**config, "layers_block_type": ["mamba", "moe"]}, "x")
    assert with_experts.counted is not None and with_experts.counted.stacked > 0


def test_a_known_type_asks_no_class(monkeypatch, folder):
    monkeypatch.setattr(counting, "_ask", None)
    assert model_dimensions(folder("Qwen2.5-0.5B")).counted is None


def test_a_cpu_plan_says_what_the_process_shows(recipe):
    plan = make_plan(recipe("SmolLM2-135M"), cpu(16), "cpu")
    process = plan.memory["process"]
    assert list(process) == ["live_tensors", "libraries", "kernels", "allocator"]
    assert process["live_tensors"] == plan.memory["peak_bytes"] == plan.memory["low_bytes"]
    assert plan.peak_bytes_range[1] == sum(process.values())
    assert plan.peak_bytes_range[0] == sum(process.values()) - process["allocator"]
    assert "process" not in make_plan(recipe("SmolLM2-135M"), card(8), "x").memory


def test_sizes_that_were_counted_compare_as_others_do(in_process):
    config = fields_of(config_of("helium"), "helium")
    assert dimensions_from_config(config, "x") == replace(dimensions_from_config(config, "y"), note="")
