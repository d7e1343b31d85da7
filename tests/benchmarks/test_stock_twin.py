"""The stock step on sizes beside the real transformers, peft and bitsandbytes on the CPU."""

import pytest
from stock_twin import SHAPE, measured, predicted, run_of

from lowmem_rlhf.planning.stock_run import BLOCKS

FOUR_BIT = {"quantization": "nf4", "precision": "float16"}
FULL = {"quantization": "none", "precision": "float32"}
DIFFERS = {
    "phi3": {"head_dim": None, "sliding_window": None},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 512},
    "gemma3_text": {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def config_of(family, **changes):
    config = {**SHAPE, "model_type": family, **DIFFERS.get(family, {}), **changes}
    if family == "gemma3_text":
        config["num_hidden_layers"] = 4
    return {key: value for key, value in config.items() if value is not None}


def targets_of(family):
    return ("qkv", "o") if family == "phi3" else ("q", "k", "v", "o")


def close(run, config, folder):
    """Forward and step peaks within 1.5 %: what is left are the tokens, positions and numbers a row."""
    for real, ours in zip(measured(run, config, folder), predicted(run), strict=True):
        assert ours == pytest.approx(real, rel=0.015)


@pytest.mark.parametrize("family", [name for name in BLOCKS if name != "gemma3_text"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_families_take_what_the_real_model_takes(family, checkpointing, tmp_path):
    config = config_of(family)
    settings = {**FULL, "attention": "eager", "r": 4, "targets": targets_of(family)}
    run = run_of(config, 2, 48, gradient_checkpointing=checkpointing, **settings)
    close(run, config, tmp_path)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({**FOUR_BIT, "attention": "eager", "gradient_checkpointing": True}, (1, 96)),
        ({**FOUR_BIT, "attention": "eager", "gradient_checkpointing": False}, (2, 48)),
        ({**FOUR_BIT, "attention": "sdpa", "double_quantization": True, "gradient_checkpointing": False}, (2, 48)),
        ({**FULL, "attention": "sdpa", "gradient_checkpointing": True, "targets": ("all-linear",)}, (1, 96)),
        ({"quantization": "none", "precision": "float16", "attention": "eager", "targets": ("q", "down")}, (1, 96)),
        ({"quantization": "none", "precision": "bfloat16", "attention": "sdpa", "r": 32}, (4, 16)),
    ],
)
def test_settings_take_what_the_real_stack_takes(settings, shape, tmp_path):
    heads = {"num_key_value_heads": 4} if settings["attention"] == "sdpa" else {}  # on a CPU sdpa does not repeat them
    config = config_of("qwen2", **heads)
    close(run_of(config, *shape, **{"r": 4, **settings}), config, tmp_path)


def test_gemma3_norms_its_heads(tmp_path):
    """Two kinds of rotary embedding are left out, so the bound is wider."""
    config = config_of("gemma3_text")
    run = run_of(config, 2, 48, **FULL, attention="eager", r=4)
    for real, ours in zip(measured(run, config, tmp_path), predicted(run), strict=True):
        assert ours == pytest.approx(real, rel=0.03)
