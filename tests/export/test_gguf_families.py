"""A GGUF of each family is the model: transformers reads it back, and llama.cpp computes the same."""

import re

import pytest
import torch
from gguf_cases import TEXTS, byte_level, llama_cpp, mean_kl, model_folder
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from lowmem_rlhf.display.lines import Lines
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.gguf.read import read_model
from lowmem_rlhf.export.gguf.write import write_gguf
from lowmem_rlhf.progress import shown_by

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}
CASES = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama-tied-biased", {}),
    "llama-3.1": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-head-dim": ("qwen3", {"head_dim": 128}),
    "mistral": ("mistral", {"sliding_window": None}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3", GEMMA),
    "gemma3-one-kind": ("gemma3", {**GEMMA, "layer_types": ["sliding_attention", "sliding_attention"]}),
    "phi3": ("phi3", {"sliding_window": None}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "tie_word_embeddings": True}),
    "granite4": ("granite_hybrid", {"layer_types": ["full_attention"] * 2, "position_embedding_type": "rope"}),
    "granite4-h": ("granite_hybrid", {"position_embedding_type": "nope"}),
    "qwen3_5": ("qwen3_5", {"head_dim": 64}),
    "qwen3_5-tiled": ("qwen3_5", {"head_dim": 64, "linear_num_value_heads": 8}),
    "ministral3": ("ministral3", {}),
    "gemma4": ("gemma4", {"tie_word_embeddings": True, "vocab_size_per_layer_input": 512}),
    "gpt2": (
        "gpt2",
        {"tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": False, "max_position_embeddings": 1024},
    ),
}
# transformers reads of a GGUF neither Gemma 1's shifted norms, nor rotary scaling, biases, caps, widths of heads other
# than the default, nor which layers have a window; llama.cpp reads all of them
READ = ("llama", "llama-head-dim", "qwen2", "qwen3-head-dim", "mistral", "gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def written(name, tmp_path, tokenizer, kind="f16", **changes):
    family, own = CASES[name]
    folder = model_folder(family, tmp_path / "model", tokenizer, **{**own, **changes})
    write_gguf(folder, tmp_path / "model.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model, tmp_path / "model.gguf"


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", READ)
def test_transformers_reads_back_the_same_model(name, tmp_path, tokenizer):
    model, gguf = written(name, tmp_path, tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = [token for text in TEXTS for token in tokenizer(text)["input_ids"]][:90]
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), atol=2e-5, rtol=1e-4)


LEFT_OUT = {
    **{
        name: f"architecture {arch} is not supported yet"
        for name, arch in {
            **{one: one for one in ("granite", "smollm3", "olmo2")},
            **{"granite4": "granite", "granite4-h": "granitehybrid", "ministral3": "mistral3"},
        }.items()
    },  # what transformers leaves out, or takes from its defaults
    "llama-tied-biased": "(14 tensors (blk.0.attn_k.bias, ",
    "llama-3.1": "(1 tensor (rope_freqs.weight))",
    "llama-linear": "leaves its linear scaling of positions out",
    "qwen2-yarn": "leaves its yarn scaling of positions out",
    "qwen3": "of another shape (model.layers.0.self_attn.k_norm.weight: (16,) in place of (128,)",
    "gemma": "architecture gemma is not supported",
    "gemma4": "Field 'intermediate_size' expected int, got list",
    "phi3": "cannot be read: Padding_idx must be within num_embeddings",  # of a vocabulary as small as this
}


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_as_a_recipes_model_is_that_model_or_refused(name, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    model, gguf = written(name, tmp_path, tokenizer)
    if name in LEFT_OUT:
        with pytest.raises(UserError, match=re.escape(LEFT_OUT[name])):
            load_base(str(gguf), "none", "float32", torch.device("cpu"))
        return
    again, _ = load_base(str(gguf), "none", "float32", torch.device("cpu"))
    ids = [token for text in TEXTS for token in tokenizer(text)["input_ids"]][:90]
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_numbers_are_read_back(name, tmp_path, tokenizer):
    model, gguf = written(name, tmp_path, tokenizer)
    again = read_model(gguf, tmp_path / "model")
    for key, weights in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], weights, atol=2e-7, rtol=0, msg=key)


@pytest.mark.parametrize(
    "kind, least, most",
    [
        ("bf16", 1e-4, 3e-3),
        ("q8_0", 1e-3, 1e-2),
        *(("q6_k", 2e-3, 3e-2), ("q5_k_m", 2e-3, 0.05), ("q4_k_m", 5e-3, 0.1)),
    ],
)
def test_quantized_numbers_are_near(kind, least, most, tmp_path, tokenizer):
    model, gguf = written("qwen2", tmp_path, tokenizer, kind, hidden_size=256, intermediate_size=512)
    again = read_model(gguf, tmp_path / "model").state_dict()
    for key, weights in model.state_dict().items():
        error = float((again[key] - weights).norm() / weights.norm())
        assert error == 0 if weights.ndim < 2 else least < error < most, key


@pytest.mark.parametrize("name", sorted(CASES))
def test_llama_cpp_computes_the_same(name, tmp_path, tokenizer):
    model, gguf = written(name, tmp_path, tokenizer)
    ids = [token for text in TEXTS for token in tokenizer(text)["input_ids"]][:90]
    said = llama_cpp(gguf, probabilities=[ids])["probabilities"]
    # what is multiplied with float16 weights is rounded to float16 there: 2e-9 to 2.4e-4
    assert mean_kl(logits_of(model, ids), said) < 3e-4


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("gpt_neox", {}, "no GGUF is written here of the model type gpt_neox, only of gemma"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar=20, and llama.cpp takes 16"),
        ("gpt2", {}, "attention scaled by layer"),
        ("gemma4", {"vocab_size_per_layer_input": 512, "attention_bias": True}, "biases in its attention"),
        ("granite_hybrid", {"num_local_experts": 2, "num_experts_per_tok": 1}, "has experts, of which no GGUF is writ"),
        ("llama", {"hidden_act": "relu"}, "relu in its feed-forward layers"),
        ("qwen3", {"attention_bias": True}, "biases in its attention's output"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of the type dynamic",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, message, tmp_path, tokenizer):
    folder = model_folder(family, tmp_path / "model", tokenizer, **changes)
    with pytest.raises(UserError, match=message):
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_window_that_llama_cpp_has_not_is_said(tmp_path, tokenizer, capfd):
    folder = model_folder("mistral", tmp_path / "model", tokenizer)  # 5 tokens
    with shown_by(Lines()):
        write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert "this model attends to the latest 5: on texts longer than that its answers differ" in capfd.readouterr().err
