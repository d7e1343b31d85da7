"""The stock step on sizes beside the real transformers, peft and bitsandbytes on the CPU."""

import pytest
from stock_twin import SHAPE, measured, predicted, run_of

from lowmem_rlhf.architecture.families import family_of, types_with_terms

FOUR_BIT = {"quantization": "nf4", "precision": "float16"}
FULL = {"quantization": "none", "precision": "float32"}
NO_DROPOUT = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "attention_dropout", "residual_dropout")
HEADS = {"head_dim": None, "num_key_value_heads": 4}
WIDE = {"sliding_window": 512}
DIFFERS = {
    "mistral": {"sliding_window": None},
    "gemma2": WIDE,
    "gemma3_text": {**WIDE, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi": {**HEADS, "partial_rotary_factor": 0.4},
    "phi3": {"head_dim": None, "sliding_window": None, "partial_rotary_factor": 0.75},
    "gpt_neox": HEADS,
    "opt": {**HEADS, "ffn_dim": 192, "word_embed_proj_dim": 64},
    "starcoder2": {"head_dim": None, "sliding_window": None, "embedding_dropout": 0.0},
    "cohere": {"head_dim": None},
    "cohere2": {**WIDE, "head_dim": None, "layer_types": ["sliding_attention"] * 3},
    "olmo3": {**WIDE, "layer_types": ["full_attention"] * 3},
    "granite": {"head_dim": None},
}
LESS_EXACT = {"cohere": 0.07, "cohere2": 0.07, "gemma3_text": 0.015}  # norms in Python; a second rotary embedding


def config_of(family, **changes):
    config = {**SHAPE, "model_type": family, **dict.fromkeys(NO_DROPOUT, 0.0), **DIFFERS.get(family, {}), **changes}
    if family == "gpt2":
        config |= {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True}
        config = {k: v for k, v in config.items() if k not in ("hidden_size", "num_hidden_layers", *HEADS)}
        del config["intermediate_size"], config["num_attention_heads"], config["max_position_embeddings"]
    return {key: value for key, value in config.items() if value is not None}


def close(run, config, folder, bound=0.01):
    """What is left of a difference are tokens, positions, numbers a row, and names that GPT-2's forward pass holds."""
    (forward, step), (our_forward, our_step) = measured(run, config, folder), predicted(run)
    assert our_forward == pytest.approx(forward, rel=max(bound, 0.02))
    assert our_step == pytest.approx(step, rel=bound)


# not those that take images as well, nor those with layers of unlike kinds
ALIKE = [name for name in types_with_terms() if name != "gemma3" and not family_of(name).counted]


@pytest.mark.parametrize("family", ALIKE)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_families_take_what_the_real_model_takes(family, checkpointing, tmp_path):
    config = config_of(family)
    settings = {**FULL, "attention": "eager", "r": 4, "targets": ("all-linear",)}
    run = run_of(config, 2, 48, gradient_checkpointing=checkpointing, **settings)
    close(run, config, tmp_path, LESS_EXACT.get(family, 0.01))


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
